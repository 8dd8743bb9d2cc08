"""Losses and learning rates of a run's log, or of two, as lines for a page. It wraps no step.

A drawing is 1000 x 100, whatever size it is shown at; its labels stand beside it.
"""

import numpy as np

WIDTH, HEIGHT = 1000, 100


def curves(logs):
    """What the page draws of {name: training log}: lines of losses and of learning rates, and their ticks.

    A line is {"name", "what" ("loss", "smooth", "validation" or "rate"), "place" of the log, "points" [(x, y)]}.
    """
    found = []
    for place, (name, log) in enumerate(logs.items()):
        losses, validation, rates = (
            np.array([(entry["step"], entry[what]) for entry in log if what in entry], float).reshape(-1, 2)
            for what in ("loss", "eval_loss", "learning_rate")
        )
        losses, validation = (line[np.isfinite(line).all(axis=1)] for line in (losses, validation))
        smooth = np.column_stack([losses[:, 0], smoothed(losses[:, 1])])
        lines = {"loss": losses, "smooth": smooth, "validation": validation, "rate": rates}
        found += [
            {"name": name, "place": place, "what": what, "values": line} for what, line in lines.items() if len(line)
        ]
    steps = [entry["step"] for log in logs.values() for entry in log if "step" in entry]
    last = max(steps, default=1)
    highest = {True: 0, False: 0}
    for line in found:
        is_rate = line["what"] == "rate"
        highest[is_rate] = max(highest[is_rate], line["values"][:, 1].max())
    for line in found:
        top = highest[line["what"] == "rate"] or 1
        x, y = line["values"][:, 0] / last, 1 - line["values"][:, 1] / top
        line["points"] = np.column_stack([WIDTH * x, HEIGHT * y]).round(1).tolist()
    return {
        "losses": [line for line in found if line["what"] != "rate"],
        "rates": [line for line in found if line["what"] == "rate"],
        "loss_ticks": ticks(highest[False] or 1, 5),
        "rate_ticks": ticks(highest[True] or 1, 2),
        "step_ticks": ticks(last, 6),
        "window": window(max((len(line["values"]) for line in found if line["what"] == "loss"), default=0)),
        "count": len(logs),
        "runs": [about(name, [line for line in found if line["name"] == name]) for name in logs],
    }


def window(count):
    """Over how many losses of so many a smoothed one is a mean: the noise goes, and the form stays."""
    return max(1, count // 20)


def smoothed(values):
    """The means of each value and those around it, weighted by their distance. At the ends they are of fewer."""
    weights = np.hanning(2 * window(len(values)) + 1)[1:-1]  # as wide as a plain mean of half its length
    if len(values) < 2:
        return values
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def about(name, lines):
    """A run in words: the smoothed loss at its end, and the lowest validation loss."""
    values, said = {line["what"]: line["values"] for line in lines}, []
    if "smooth" in values:
        said.append(f"{values['smooth'][-1, 1]:.3g} at the end")
    if "validation" in values:
        step, loss = values["validation"][values["validation"][:, 1].argmin()]
        said.append(f"lowest validation loss {loss:.3g}, at step {step:,.0f}")
    return {"name": name, "validated": "validation" in values, "said": "; ".join(said)}


def ticks(top, most):
    """At most so many round numbers above 0, up to `top`, and 0: each with its share of `top`."""
    unit = 10 ** np.floor(np.log10(top / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if top / (unit * factor) <= most)
    return [
        (i * step / top, f"{i * step:,.3g}" if i * step < 1000 else f"{i * step:,.0f}")
        for i in range(int(top / step + 1e-9) + 1)
    ]

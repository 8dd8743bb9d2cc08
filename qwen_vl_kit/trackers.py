"""Trackers (TensorBoard, Trackio, W&B): beside the losses, which the trainer sends, what a run is about.

Wraps `make_trainer`, to know where the losses go, and `save`: the held-out scores before and after, the sample's image
and all readings go to the same run. The trackers close it when training ends, so it is opened once more.
"""

from datetime import datetime
from pathlib import Path

import numpy
from PIL import Image
from transformers.integrations import TensorBoardCallback

from qwen_vl_kit import run
from qwen_vl_kit.finished import metrics_of
from qwen_vl_kit.sentences import first_line

COLUMNS = ("row", "truth", "before", "after")
callbacks = []  # the trainer's


def make_trainer(step, *arguments):
    if "trackio" in run.options.report_to and not run.options.run_name:  # else its name is not known afterwards
        run.options.run_name = f"{Path(run.options.output_dir).name} {datetime.now():%Y-%m-%d %H:%M:%S}"
    trainer = step(*arguments)
    callbacks[:] = trainer.callback_handler.callbacks
    return trainer


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, metrics)
    senders = {"tensorboard": to_tensorboard, "trackio": to_trackio, "wandb": to_wandb}
    wanted = [name for name in run.options.report_to if name in senders]
    if not wanted:
        return
    found = metrics_of(outputs)
    names = [name for name, score in found["after"].items() if isinstance(score, int | float)]
    when = {0: "before", found["train"]["log"][-1]["step"]: "after"}
    scores = {steps: {f"held_out/{name}": found[part][name] for name in names} for steps, part in when.items()}
    rows = [[str(row["row"]), row["truth"], row["before"]["text"], row["after"]["text"]] for row in predictions]
    for name in wanted:
        try:
            senders[name](scores, outputs / "sample.png", rows)
        except Exception as error:  # everything is saved by now: no tracker may end the run
            print(f"{name} did not take the scores and readings: {first_line(error)}")


def to_tensorboard(scores, sample, rows):
    from torch.utils.tensorboard import SummaryWriter

    folder = next(callback.logging_dir for callback in callbacks if isinstance(callback, TensorBoardCallback))
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (COLUMNS, ("---",) * 4, *rows)]
    with SummaryWriter(log_dir=folder) as writer:
        for steps, values in scores.items():
            for name, value in values.items():
                writer.add_scalar(name, value, steps)
        with Image.open(sample) as image:
            writer.add_image("sample", numpy.asarray(image.convert("RGB")), dataformats="HWC")
        writer.add_text("readings", "\n".join(f"| {' | '.join(row)} |" for row in cells))


def to_trackio(scores, sample, rows):
    import trackio

    where = {"space_id": run.options.trackio_space_id, "bucket_id": run.options.trackio_bucket_id}
    trackio.init(project=run.options.project, name=run.options.run_name, resume="allow", **where)
    for steps, values in scores.items():
        trackio.log({**values, "train/global_step": steps})
    trackio.log({"sample": trackio.Image(str(sample)), "readings": trackio.Table(columns=[*COLUMNS], data=rows)})
    trackio.finish()


def to_wandb(scores, sample, rows):
    import wandb

    for steps, values in scores.items():
        wandb.log({**values, "train/global_step": steps})
    wandb.log({"sample": wandb.Image(str(sample)), "readings": wandb.Table(columns=[*COLUMNS], data=rows)})

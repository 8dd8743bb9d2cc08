"""Reading images: as many at once as fit into memory.

Wraps `read`: where memory runs out, the batch is halved, and reading resumes where it was. Wraps `save`: beside the
adapter lies how it is to be asked and loaded, for whoever has nothing else of the run.
"""

from tqdm.auto import tqdm

from qwen_vl_kit import loading, run
from qwen_vl_kit.memory import if_it_fits


def read(step, samples, batch_size):
    readings = []
    with tqdm(total=len(samples), desc="Reading held-out images") as bar:
        while len(readings) < len(samples):
            batch = samples.select(range(len(readings), min(len(readings) + batch_size, len(samples))))
            if some := if_it_fits(lambda: step(batch, batch_size), batch_size > 1):  # noqa: B023 (called at once)
                readings += some
                bar.update(len(some))
            else:
                batch_size //= 2
    return readings


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, metrics)
    how = loading.how_of(metrics | {"quantization": run.notes["quantization"]})
    loading.write_how(outputs / "adapter", how)

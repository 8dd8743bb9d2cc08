"""The data set of the demo: photographs of a school's blackboard, in the layout of the Hugging Face hub."""

import io
import json
import multiprocessing
import random
import shutil

from PIL import Image

from maker import formulas, pages


def draw_row(job):
    """One row of the data set: (WebP bytes, text). `job`: (seed, whether it is held out)."""
    seed, held_out = job
    rng = random.Random(seed)
    while True:
        latex = formulas.draw_formula(rng, (0, 1, 0, 0), formulas.BLACKBOARD, longest=9)
        if formulas.is_held_out(latex) != held_out or len(formulas.spelling_free(latex)) < 4:
            continue
        try:
            image = pages.photograph_blackboard(latex, rng)
        except (ValueError, RuntimeError):
            continue
        if image.shape[1] <= 168:
            photo = io.BytesIO()
            Image.fromarray(image).save(photo, "WEBP", quality=78)
            return photo.getvalue(), latex


def make_data(folder, train_rows, test_rows, seed, workers):
    """Write `train` and `test` as the hub keeps them: parquet files with an `image` and a `text` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Read by `datasets`: it makes the column decode to a PIL image.
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()}, metadata)
    splits = {}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for split, rows in {"train": train_rows, "test": test_rows}.items():
            jobs = ((f"{seed}-{split}-{i}", split == "test") for i in range(rows * 2))
            unique = {}
            for photo, latex in pool.imap(draw_row, jobs, chunksize=8):
                unique.setdefault(formulas.spelling_free(latex), ({"bytes": photo, "path": None}, latex))
                if len(unique) == rows:
                    break
            splits[split] = unique
    assert not splits["train"].keys() & splits["test"].keys(), "a held-out formula is among the training rows"
    assert all(formulas.is_held_out(latex) for _, latex in splits["test"].values())
    assert not any(formulas.is_held_out(latex) for _, latex in splits["train"].values())
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for split, unique in splits.items():
        images, texts = zip(*unique.values(), strict=True)
        table = pa.table({"image": images, "text": texts}, schema)
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
        lengths = sorted(len(text.split()) for text in texts)
        print(f"{split}: {len(texts)} formulas, {lengths[len(lengths) // 2]} tokens (median), {lengths[-1]} (longest)")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*.parquet')) / 1e6:.1f} MB")

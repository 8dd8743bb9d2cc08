"""Times the script beside LLaMA-Factory, ms-swift and Unsloth's notebook; writes peers.json and peers.md.

usage: python benchmarks/peers.py [--model NAME] [--dataset NAME] [--output FOLDER] [--steps 30] [--limit SECONDS]
                                  [--llamafactory PYTHON [FOLDER ...]] [--swift PYTHON [FOLDER ...]]
                                  [--runs ours llamafactory-tuned swift-tuned llamafactory swift notebook]
                                  [--OPTION VALUE ...]

All train on the same rows, 8 samples an optimizer step, with LoRA of rank 16 on vision and language. A peer may have an
environment of its own: name its interpreter, and folders for its PYTHONPATH. One that is not installed is left out.
Some `--runs` alone are added to what the output folder holds. Options not named here go to the script.
Without a GPU only the script runs, with the demo's model, which shows that it works and no more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from datasets import load_dataset
from runs import ROOT, SCRIPT, ended, watched
from transformers import AutoConfig

INSTRUCTION = "Write the LaTeX representation for this image."
SMALLEST, LARGEST = 3136, 1003520  # pixels of an image, as in the model's own processor: nobody enlarges any
NAMES = {"ours": "this script", "llamafactory": "LLaMA-Factory", "swift": "ms-swift", "notebook": "Unsloth's notebook"}
PACKAGES = {"ours": "transformers", "llamafactory": "llamafactory", "swift": "ms-swift", "notebook": "unsloth"}
TUNED = "-tuned"  # by hand: 8 x 1, activations kept; else as it comes, 2 x 4, recomputed
RUNS = ("ours", "llamafactory-tuned", "swift-tuned", "llamafactory", "swift", "notebook")
VERSIONS = """import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))"""


def write_data(name, rows, folder):
    """Writes the first `rows` rows for everybody to `folder`: as parquet, and in the formats of the peers."""
    splits, samples = load_dataset(name), []
    train = splits["train"].select(range(min(rows, len(splits["train"]))))
    # The script reads one image before training, so it should be soon read: the shortest of some.
    shortest = min(range(min(64, len(splits["test"]))), key=lambda row: len(splits["test"][row]["text"]))
    parquet = folder / "parquet"
    parquet.mkdir()
    train.to_parquet(parquet / "train.parquet")
    splits["test"].select([shortest]).to_parquet(parquet / "test.parquet")
    for number, row in enumerate(train):
        image = folder / f"{number}.png"
        row["image"].convert("RGB").save(image)
        question = {"role": "user", "content": f"<image>{INSTRUCTION}"}
        messages = [question, {"role": "assistant", "content": row["text"]}]
        samples.append({"messages": messages, "images": [str(image)]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    info = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": info}))


def ours(options, data, out, tuned):
    how = {"model_name_or_path": options.model, "dataset_name": data / "parquet", "output_dir": out}
    how |= {"max_steps": options.steps, "batch_size": 8, "min_pixels": SMALLEST, "num_test_rows": 1}
    how |= {"max_new_tokens": 1, "save_strategy": "no", "logging_steps": 1}
    return [SCRIPT, *as_options(how), *options.more], {}


def notebook(options, data, out, tuned):
    return ["benchmarks/stock_recipe.py", options.model, data / "parquet", options.steps], {}


def llamafactory(options, data, out, tuned):
    how = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": options.model,
        "template": "qwen2_vl",
        "dataset": "rows",
        "dataset_dir": str(data),
        "cutoff_len": 2048,
        "preprocessing_num_workers": 4,
        "dataloader_num_workers": 4,
        "image_min_pixels": SMALLEST,
        "image_max_pixels": LARGEST,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_target": "all",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": True,
        "disable_gradient_checkpointing": tuned,
        "save_strategy": "no",
        **common(options, out, tuned),
    }
    if not quantized(options.model):
        how |= {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}
    config = data / "train.yaml"
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in how.items()))
    return ["-m", "llamafactory.cli", "train", config], {}


def swift(options, data, out, tuned):
    how = {
        "model": options.model,
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "use_hf": True,
        "check_model": False,
        "dataset": data / "rows.jsonl",
        "split_dataset_ratio": 0,
        "max_length": 2048,
        "dataset_num_proc": 4,
        "dataloader_num_workers": 4,
        "torch_dtype": "bfloat16",
        "tuner_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "freeze_vit": False,
        "freeze_aligner": True,
        "gradient_checkpointing": not tuned,
        "save_strategy": "no",
        "eval_strategy": "no",
        **common(options, out, tuned),
    }
    if not quantized(options.model):
        how |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": "bfloat16"}
    limits = {"MIN_PIXELS": SMALLEST, "MAX_PIXELS": LARGEST}
    return ["-m", "swift.cli.main", "sft", *as_options(how)], limits


def common(options, out, tuned):
    """What LLaMA-Factory and ms-swift call alike, as transformers does."""
    size, times = (8, 1) if tuned else (2, 4)
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
    how = {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_steps": 5, "bf16": True, "seed": 3407}
    return {**split, **how, "max_steps": options.steps, "logging_steps": 1, "report_to": "none", "output_dir": str(out)}


def as_options(how):
    return [word for name, value in how.items() for word in (f"--{name}", str(value))]


def quantized(model):
    return hasattr(AutoConfig.from_pretrained(model), "quantization_config")


def environment_of(peer, options, clock, **more):
    """The interpreter of a peer and its environment."""
    python, *folders = getattr(options, peer, None) or [sys.executable]
    environment = watched(clock, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0], **more)
    first, *others = environment["PYTHONPATH"].split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([first, *map(os.path.abspath, folders), *others])
    return python, environment


def versions(peer, options):
    """The versions of a peer and of what it runs on, or None if it is not installed."""
    python, environment = environment_of(peer, options, "")
    wanted = dict.fromkeys((PACKAGES[peer], "transformers", "trl", "peft", "torch"))
    found = subprocess.run([python, "-c", VERSIONS, *wanted], env=environment, capture_output=True, text=True)
    return None if found.returncode else json.loads(found.stdout)


def timed(name, options, log):
    """Runs one of RUNS. Returns what was measured, and how it ended if not well."""
    peer, tuned = name.removesuffix(TUNED), name.endswith(TUNED)
    with tempfile.TemporaryDirectory() as folder:
        data, clock = Path(folder, "data"), Path(folder, "clock.json")
        data.mkdir()
        write_data(options.dataset, 8 * options.steps, data)
        command, more = globals()[peer](options, data, Path(folder, "out"), tuned)
        python, environment = environment_of(peer, options, clock, **more)
        started = time.time()
        failure = ended([python, *command], log, environment, options.limit)
        noted = json.loads(clock.read_text()) if clock.exists() else {"ticks": []}
    result = {"failed": f"{failure}, see {log.name}"} if failure else {}
    ticks = noted["ticks"]
    if len(ticks) < 2:
        return {"failed": f"{failure or 'no training was seen'}, see {log.name}"}
    each = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    return result | {
        "layout": noted["layout"],
        "step_s": statistics.median(each[3:] or each),
        "first_step_s": ticks[0] - noted["begun"],
        "start_to_training_s": noted["begun"] - started,
        "peak_gib": noted.get("peak_gib"),
        "steps_s": each,
        "losses": noted["losses"],
    }


def title(name):
    peer = NAMES[name.removesuffix(TUNED)]
    return f"{peer}, {'tuned by hand' if name.endswith(TUNED) else 'as it comes'}"


def table(results):
    """The results as Markdown."""
    lines = [
        f"{results['date']}, {results['hardware']}, model {results['model']}, {results['steps']} steps of 8.",
        "",
        "| | layout | step | times ours | first step | start to training | peak reserved | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs, notes = results["runs"], []
    for name in (name for name in RUNS if name in runs):
        run = runs[name]
        if "failed" in run:
            notes.append(f"{title(name)}: {run['failed']}.")
        if "step_s" in run:
            size, times, recomputed = run["layout"]
            ratio = f"{run['step_s'] / runs['ours']['step_s']:.1f}" if "step_s" in runs.get("ours", {}) else "-"
            memory = f"{run['peak_gib']:.1f} GiB" if run["peak_gib"] else "-"
            cells = [f"{size} x {times}, {'recomputed' if recomputed else 'kept'}", f"{run['step_s']:.2f} s", ratio]
            cells += [f"{run['first_step_s']:.1f} s", f"{run['start_to_training_s']:.1f} s", memory]
            lines.append(f"| {title(name)} | {' | '.join(cells)} | {run['losses'][0]:.2f} |")
    used = {NAMES[name.removesuffix(TUNED)]: run["versions"] for name, run in runs.items() if "versions" in run}
    listed = [f"{peer}: {', '.join(' '.join(pair) for pair in found.items())}." for peer, found in used.items()]
    return "\n".join([*lines, *(f"\n{note}" for note in notes + listed)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a hub name or a folder")
    parser.add_argument("--dataset", help="a hub name or a folder, with the columns image and text")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/benchmark")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=float, help="seconds after which a run is ended; its steps so far count")
    parser.add_argument("--llamafactory", nargs="+", metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--swift", nargs="+", metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--runs", nargs="+", choices=RUNS)
    options, options.more = parser.parse_known_args()
    on_gpu = torch.cuda.is_available()
    for name in ("model", "dataset"):  # the script runs in its own folder
        if (given := getattr(options, name)) and Path(given).exists():
            setattr(options, name, str(Path(given).resolve()))
    options.model = options.model or ("unsloth/Qwen2-VL-7B-Instruct-bnb-4bit" if on_gpu else str(ROOT / "demo/model"))
    options.dataset = options.dataset or ("unsloth/LaTeX_OCR" if on_gpu else str(ROOT / "demo/data"))
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "peers.json"
    results = json.loads(path.read_text()) if options.runs and path.exists() else {"runs": {}}
    results |= {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
        "model": options.model,
        "steps": options.steps,
    }
    if not on_gpu and not options.runs:
        print("There is no GPU: only the script runs, with the demo's model, to see that it works.")
    for name in options.runs or (RUNS if on_gpu else ("ours",)):
        found = versions(name.removesuffix(TUNED), options)
        print(f"{title(name)} ..." if found else f"{title(name)}: not installed, left out.", flush=True)
        run = timed(name, options, output / f"{name}.log") if found else {"failed": "not installed, left out"}
        results["runs"][name] = run | ({"versions": found} if found else {})
        path.write_text(json.dumps(results, indent=1) + "\n")
        (output / "peers.md").write_text(table(results))
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()

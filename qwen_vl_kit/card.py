"""The model card of a run's adapter, `adapter/README.md`, with the scores in the hub's own form. It wraps no step."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qwen_vl_kit.finished import local_names
from qwen_vl_kit.report_page import helpers, template
from qwen_vl_kit.scores import SCORES


def make_card(outputs, metrics, rows, run):
    """The model card, of so many held-out rows and a table of what was run.

    The base model and the data are only linked where they have a name on the hub.
    """
    settings, local = metrics["settings"], local_names(outputs, metrics)
    hub = {"base_model": "model_name_or_path", "datasets": "dataset_name"}
    result = {"task_type": "image-to-text", "dataset_type": run["data"], "dataset_name": run["data"]}
    result["dataset_split"] = metrics["test_split"]
    data = ModelCardData(
        model_name=f"{run['model']} for LaTeX OCR",
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "latex-ocr", "trl", "sft"],
        eval_results=[EvalResult(**result, metric_type=name, metric_value=metrics["after"][name]) for name in SCORES],
        **{key: settings[setting] for key, setting in hub.items() if setting not in local},
    )
    filled = {"name": data.model_name, "model": run["model"], "data": run["data"], "run": run}
    filled |= {when: metrics[when] for when in ("before", "after", "difference")} | helpers(rows)
    filled |= {"instruction": settings["instruction"], "layers": metrics.get("adapted_layers")}
    filled["guarded"] = "run" in metrics
    return str(ModelCard.from_template(data, template_str=template("card.md.j2"), **filled))

"""The Hugging Face hub: what is in the cache is loaded without the network, the rest is asked for with patience.

Wraps `load_processor`, `load_splits` and `load_model`: a hub that is slow or busy is asked again, and what can't be
loaded ends the run with the reason in a sentence.
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import datasets
import huggingface_hub
from datasets.exceptions import DatasetGenerationError, DatasetsError
from httpx import HTTPError
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, GenerationConfig

from qwen_vl_kit import parallel, run
from qwen_vl_kit.sentences import fail, first_line
from qwen_vl_kit.sources import FILE_TYPES

online = not datasets.config.HF_HUB_OFFLINE


def allow_network(allow):
    """Lets the hub be asked, or not; never where the user has forbidden it by HF_HUB_OFFLINE."""
    os.environ["HF_HUB_OFFLINE"] = str(int(not (allow and online)))
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = not (allow and online)


def patiently(name, get, cached=True):
    """What `get` loads by `name`: out of the cache, without the network, or else from the hub.

    A hub that is busy is asked again after 5 and 30 s (a failing connection its own client has tried again). If it
    can't be reached, that is a ConnectionError; other errors are those of `get`.
    """
    allow_network(not cached)
    if online and cached and not Path(name).exists():
        try:
            return get()
        except Exception:  # not, or not all of it, is in the cache
            allow_network(True)
    for wait in (5, 30, None):
        try:
            return get()
        except Exception as error:
            http = error
            while http and not isinstance(http, HTTPError):
                http = http.__cause__ or http.__context__
            status = getattr(getattr(http, "response", None), "status_code", 0)
            if not http or 400 <= status < 429:
                raise
            if status < 429 or not wait:
                raise ConnectionError(first_line(http)) from error
            print(f"{first_line(http)}. Trying again in {wait} s")
        time.sleep(wait)


def load(what, name, get, cached=True):
    """What `get` loads by `name`, patiently; if it can't, the run ends with the reason, plainer than the libraries'."""
    try:
        return patiently(name, get, cached)
    except ImportError as error:
        fail(f"{name} needs a package that is not installed: {' '.join(str(error).split())}")
    except (OSError, TypeError, ValueError, DatasetsError, HTTPError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        reason = first_line(cause)
        if "arget module" in str(error):  # PEFT's, of a model that was found
            fail(f"--lora_target_modules matches no layer of {name}: leave it out, or choose another expression.")
        if cause is not error:
            reason = f"there are no rows that can be read ({reason})"
        if Path(name).exists():  # the hub was not asked
            fail(f"Could not load the {what} {name!r}: {reason}.")
        on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and Path(name).suffix.lower() not in FILE_TYPES
        if not on_hub:
            fail(f"Could not load the {what} {name!r}: there is no such file or folder. Check the path.")
        fail(
            f"Could not load the {what} {name!r}: {reason}. Check the name or the path, the network, and, if it is "
            "gated, that you are logged in (hf auth login)."
        )


def load_processor(step, options):
    name = options.model_name_or_path

    def get():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # says best what is wrong
        with suppress(OSError):  # weights are what comes last to the cache: where they are, all is
            GenerationConfig.from_pretrained(name)
        return config, step(options)

    config, run.processor = load("model", name, get)
    if parallel.sharded and hasattr(config, "quantization_config"):
        fail(
            f"{name} is stored quantized, which FSDP can't shard: name the 16-bit model it was made from, such as "
            "Qwen/Qwen2-VL-7B-Instruct. It is quantized to 4 bits when it is loaded."
        )
    if not run.processor.chat_template:
        fail(f"{name} has no chat template: choose an instruction-tuned model (...-Instruct).")
    return run.processor


def load_splits(step, options):
    return load("data set", options.dataset_name, lambda: step(options))


def load_model(step, options, *arguments):
    weights = f"models--{options.model_name_or_path.replace('/', '--')}/snapshots/*/*.safetensors"
    cached = any(Path(HF_HUB_CACHE).glob(weights))
    model = load("model", options.model_name_or_path, lambda: step(options, *arguments), cached)
    allow_network(bool(run.exports))  # all that training needs is here
    return model

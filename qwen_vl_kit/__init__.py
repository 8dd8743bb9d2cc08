"""The machine room of finetune_qwen_vl.py: what makes its steps faster, safer and larger. `seam` lists which and how.

The script works without this folder. With it, no step computes anything else; `python -m qwen_vl_kit` lists what can be
done after a run.
"""

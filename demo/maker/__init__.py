"""What makes `demo/model` and `demo/data`; `../make_demo.py` is the command.

formulas    what is written: a grammar, and real formulas taken apart and put together anew
pages       how it is drawn: by pdfTeX as printed pages are, by matplotlib in other typefaces and on a blackboard
rows        the data set of the demo
blank       the empty model, its tokenizer and its processor
feed        processes that write and draw for the training, and the pools that it draws its batches from
forward     the model's loss, over images of one size at once
wear        how pages are worn while it trains
training    the base model's training
"""

INSTRUCTION = "Write the LaTeX representation for this image."

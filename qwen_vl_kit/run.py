"""The state of the current run: each room stores here what other rooms need to read."""

options = None  # the script's Options, as soon as they are read
extra = None  # options.ExtraOptions: those that only the kit has
exports = {}  # what export.py is to do at the end
layouts = []  # [(samples at once, micro-batches per step, whether activations are recomputed), ...], the fastest first
processor = None
model = None
usual_kernels = None  # a function that has the model compute without those of `kernels`
data_folder = None  # where relative paths of images start
dropped_parts = 0  # of each path, which then starts in that folder
lines_of = {}  # {split: a function that says on which line of its file a row is, or None}
test_rows = None  # the data set that held-out rows are taken from, undecoded
test_numbers = ()  # their numbers in it
test_examined = ()  # these, and those of rows that were looked at and left out
train_rows = None  # the same of the training rows
lengths = {}  # of the training rows: {number: about tokens}
order = ()  # the numbers of the training rows, as they follow one another in training
digests = {}  # of the rows that are used: {("training" or "held-out", number): digest of image and text}
skipped = []  # the rows that were left out, {"row": number, "split": str, "reason": str} each
validation_set = None  # rows that are neither trained on nor scored, for losses on the way; a data set, or None
record = {}  # what the run is made of, as room `record` has it
resumed = None  # the record of the checkpoint that it resumes from, or None
trained = False  # whether the model has begun to train
began = 0.0  # when training began, on the clock of time.perf_counter
notes = {}  # what goes into metrics.json beside what the script puts there

"""The names of the figures in metrics.jsonl: `group/name`, with the unit where there is one.

Those of spectra are medians over layers: `SPECTRA_PREFIX` and the name of a layer's figure.
"""

SPECTRA_PREFIX = "spectra/"

AUXILIARY_LOSS = "train/auxiliary_loss"
CHANGE = "train/change"  # settings that are others from here on, in words
GRAD_NORM = "train/grad_norm"
TRAIN_LOSS = "train/loss"
LOSS_SCALE = "train/loss_scale"
LR = "train/lr"
LR_BEFORE = "train/lr_before_change"  # of the step that comes next, by the old settings
LR_AFTER = "train/lr_after_change"
ROLLBACK_COUNT = "train/rollbacks"
SKIPPED = "train/skipped"
SPIKE_LOSS = "train/spike_loss"
SPIKE_SEQUENCES = "train/spike_sequences"
SPIKE_STEP = "train/spike_step"
SPIKE_THRESHOLD = "train/spike_threshold"
TOKENS = "train/tokens"

EVAL_LOSS = "eval/loss"
EVAL_ERROR = "eval/standard_error"  # of the loss
PERPLEXITY = "eval/perplexity"
SAMPLE = "eval/sample"
SEQUENCE_LOSSES = "eval/sequence_losses"  # of a run's end: one for each sequence, in their order
EVAL_TOKENS = "eval/tokens"

BIRTH = "relora/birth"
CYCLE = "relora/cycle"
MERGE = "relora/merge"
PROBE_DEVIATION = "relora/probe_deviation"
ROUNDING_LOSS = "relora/rounding_loss"
UPDATE_RATIO = "relora/update_ratio"
ZEROED_SHARE = "relora/zeroed_share"

MEMORY_GIB = "perf/memory_gib"
STEP_MS = "perf/step_ms"
TOKENS_PER_S = "perf/tokens_per_s"

BIRTH_S = "time/birth_s"
COMMIT_S = "time/commit_s"
ELAPSED_S = "time/elapsed_s"
EVAL_S = "time/eval_s"
MERGE_S = "time/merge_s"
SAVE_S = "time/save_s"
SPECTRA_S = "time/spectra_s"
WRITE_S = "time/write_s"

CYCLE_EFFECTIVE_RANK = "spectra/cycle_effective_rank"
OVERLAP = "spectra/overlap"
SINGULAR_VALUES = "spectra/singular_values"

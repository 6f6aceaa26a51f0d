"""The names of the figures in metrics.jsonl: `group/name`, with the unit where there is one.

Those of spectra are medians over layers: `SPECTRA_PREFIX` and the name of a layer's figure.
"""

SPECTRA_PREFIX = "spectra/"
OVER_TOKENS_PREFIX = "tokens/"  # TensorBoard's alone: of a figure whose axis is the tokens

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
TOTAL_RATIO = "spectra/total_ratio"

# What TensorBoard says of a figure.
MEANINGS = {
    TRAIN_LOSS: "Mean over the tokens of this step's global batch, in nats per token.",
    EVAL_LOSS: "Mean over the tokens of the validation split, in nats per token.",
    EVAL_ERROR: "Standard error of the validation loss: of its mean over sequences.",
    PERPLEXITY: "exp of the validation loss.",
    EVAL_TOKENS: "Tokens that the validation loss is a mean over.",
    AUXILIARY_LOSS: "What a router's balance adds to the loss that is minimised.",
    LR: "Of this step's update.",
    GRAD_NORM: "L2 norm over all gradients, before clipping.",
    TOKENS: "Trained on so far.",
    SKIPPED: "Updates left out so far, because a gradient was not finite.",
    LOSS_SCALE: "Of fp16.",
    ROLLBACK_COUNT: "Times that the run has gone back behind a spike of the loss.",
    BIRTH: "1 where the warm start ends and the adapters are born.",
    CYCLE: "Number of the cycle that this step belongs to.",
    MERGE: "Number of the merge after this step.",
    PROBE_DEVIATION: "How far the merge has moved the logits, relative to the largest.",
    ROUNDING_LOSS: "Largest share of a layer's merged update that rounding has lost.",
    UPDATE_RATIO: "Norm of what a merge adds, by that of the weights.",
    ZEROED_SHARE: "Share of the adapters' moments that the reset has zeroed.",
    MEMORY_GIB: "Peak of rank 0 so far: of its GPU, or without one of its process.",
    STEP_MS: "Mean over the steps since the last line.",
    TOKENS_PER_S: "Mean over the steps since the last line, of all ranks together.",
    ELAPSED_S: "In the training loop, over all processes of this run.",
    OVERLAP: "Share of this cycle's subspace that lies in that of the cycle before; a median.",
    TOTAL_RATIO: "Norm of all updates since the start by that of the weights then; a median.",
}

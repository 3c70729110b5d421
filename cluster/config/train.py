"""`train`: how the model learns."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.config.augment import AugmentSection
from cluster.config.base import OPERATIONAL, Fraction, Positive, Section, one_or_range
from cluster.errors import ConfigError

Offload = Literal["none", "cpu", "nvme"]
MOST_WORKERS = 100_000


def _workers(value: Any) -> Any:
    """One number, or the least and the most, as a tuple."""
    sizes = one_or_range("train.workers", value)
    if not 1 <= sizes[0] <= sizes[-1] <= MOST_WORKERS:
        raise ConfigError(
            f"train.workers: input should be from 1 to {MOST_WORKERS}, the least first, "
            f"not {value!r}"
        )
    return sizes if len(sizes) == 2 else sizes[0]


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]


class ZeroPlusPlus(Section):
    """ZeRO++ (Wang et al., arXiv:2306.10209): less traffic between nodes, on GPUs at stage 3."""

    partition_size: Annotated[Positive, OPERATIONAL] = 1
    """Workers that hold a second copy of the parameters among them, such as those of one node, so
    that the backward pass gathers within it; 1 keeps none."""
    quantized_weights: bool = False
    """Gather parameters as 8-bit integers."""
    quantized_gradients: bool = False
    """Reduce gradients as 4-bit integers; `precision` fp16 only."""

    @property
    def on(self) -> bool:
        return self != ZeroPlusPlus()


class TrainSection(Section):
    input: Literal["corpus", "stream"] = "corpus"
    """`corpus` trains on the prepared rows. `stream` is for text too large to store prepared:
    `prepare` looks at a sample of it, and Ray Data reads, cleans and tokenises the rest on free
    CPUs while the workers train. The order is then not exact, and a run that is stopped sees
    some rows again."""
    stream_bytes: Annotated[int, OPERATIONAL, Field(ge=2**20, le=2**50)] = 2**30
    """With `input` stream: bytes of prepared rows that may wait for the workers in the cluster's
    memory; then no more are prepared."""
    augment: AugmentSection = AugmentSection()
    steps: Positive = 600
    """Optimizer steps of the whole run."""
    global_batch: Positive = 32
    """Rows per optimizer step, over all workers."""
    micro_batch: Annotated[int, OPERATIONAL, Field(ge=0)] = 0
    """Rows that one worker runs at once; 0 takes its whole share of the global batch."""
    workers: Annotated[Workers, OPERATIONAL] = 2
    """Training processes; each owns one GPU, or one CPU where the cluster has none. `[least, most]`
    lets the run go on with fewer when nodes are lost, and with more when they come back; batches
    and losses stay those of any fixed number."""
    threads_per_worker: Annotated[int, OPERATIONAL, Field(ge=1, le=1024)] = 1
    """CPU threads of each worker, reserved from the cluster."""
    labels: Annotated[dict[str, str], OPERATIONAL] = {}
    """Ray labels of the nodes that workers may run on, such as {role: gpu} or
    {ray.io/accelerator-type: H200}. All workers get their places at once, or none does."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Peak of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps of linear rise from zero to the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from the peak to `final_learning_rate` times it."""
    final_learning_rate: Fraction = 0.1
    """Share of the peak that remains at the last step."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW: decay per step of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW: decay per step of the mean squared gradient."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW: added to the root of the mean squared gradient."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Applied to matrices only; vectors (norms, biases) are exempt."""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], OPERATIONAL] = 2
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too. A run may change
    between these three where it was stopped; 0 shards nothing and continues as 0 only."""
    offload_optimizer: Annotated[Offload, OPERATIONAL] = "none"
    """Keep the optimizer's state in host memory or on a local disk, and step there. From
    `zero_stage` 1; `nvme` from 3."""
    offload_parameters: Annotated[Offload, OPERATIONAL] = "none"
    """Keep the parameters' shards in host memory or on a local disk until used; `zero_stage` 3."""
    nvme_path: Annotated[str, OPERATIONAL, Field(pattern="^(/.*)?$")] = ""
    """Folder of a local disk on every node, for `nvme`."""
    zero_plus_plus: ZeroPlusPlus = ZeroPlusPlus()
    precision: Literal["auto", "fp32", "autocast", "bf16", "fp16"] = "auto"
    """`autocast`: fp32 weights, bf16 arithmetic. `bf16`: bf16 weights with an fp32 master copy.
    `fp16`: the same in fp16 with a loss scale that follows the gradients, for GPUs without bf16.
    `auto`: bf16 on GPUs, autocast on CPUs that compute bf16 in hardware, else fp32. ZeRO stage 0
    keeps no fp32 master copy, so there `auto` is autocast and `bf16` is refused."""
    activation_checkpointing: Annotated[bool, OPERATIONAL] = False
    """Keep only the input of each block for the backward pass and compute the rest again: a third
    more arithmetic for a fraction of the memory."""
    loss_chunk: Annotated[int, OPERATIONAL, Field(ge=0)] = 0
    """Positions whose logits exist at once in a language model's loss; 0 takes all. Where the
    vocabulary is large, logits are the peak of memory."""
    compile: Annotated[bool, OPERATIONAL] = False
    """Compile the model (torch.compile): some tens of seconds at each start for faster steps; below
    `zero_stage` 3, with a C++ compiler where there is no GPU."""
    shuffle_window: Positive = 16
    """Row groups whose rows are shuffled together; a reader holds this many."""
    mix: dict[str, Annotated[float, Field(ge=0, le=1000)]] = {}
    """How often an epoch passes over a source, by its name in `data.sources`; 1 for those that are
    not named. 0.5 is another half in each epoch."""
    heldout_every: Annotated[int, OPERATIONAL, Field(ge=0)] = 0
    """Steps between two looks at held-out rows, whose loss goes to the figures of the run; 0 does
    without. Training is the same either way."""
    heldout_rows: Annotated[Positive, OPERATIONAL] = 512
    """Rows of such a look: every second held-out row, from the start of the split. A search
    compares by these, and confirms by the others."""
    checkpoint_every: Annotated[Positive, OPERATIONAL] = 200
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[Positive, OPERATIONAL] = 2
    """Newest checkpoints of a run that are kept."""
    keep_best: Annotated[int, OPERATIONAL, Field(ge=0)] = 0
    """Checkpoints that are kept beside them for the lowest loss: on held-out data where rows of the
    history carry it, else the mean over the steps since the checkpoint before."""
    save_timeout_seconds: Annotated[float, OPERATIONAL, Field(gt=0, le=86_400)] = 600.0
    """Time that storage has for a checkpoint; training goes on meanwhile, and waits for it only
    when the next one is due."""
    max_failures: Annotated[int, OPERATIONAL, Field(ge=0, le=10_000)] = 3
    """Times that lost workers are replaced before the run is given up."""
    max_skipped: Annotated[Positive, OPERATIONAL] = 3
    """Steps in a row that may be skipped because loss or gradient are not finite; then it stops."""
    on_spike: Annotated[Literal["continue", "stop", "rewind"], OPERATIONAL] = "continue"
    """When the loss leaps up: write it to the journal and go on; stop; or go back to the last
    checkpoint before it and leave out the batches from there to here."""
    spike_deviations: Annotated[float, OPERATIONAL, Field(ge=0, le=1000)] = 8.0
    """A leap is a loss above its running mean by this many running deviations; 0 looks for none."""
    spike_steps: Annotated[int, OPERATIONAL, Field(ge=1, le=100)] = 2
    """Steps in a row that make a leap."""
    hang_seconds: Annotated[float, OPERATIONAL, Field(ge=5, le=86_400)] = 25.0
    """A worker that gives no sign of life for this long is taken for hung, and replaced."""
    grace_seconds: Annotated[float, OPERATIONAL, Field(ge=0, le=3600)] = 20.0
    """Time to commit a checkpoint after Ctrl-C or SIGTERM; 0 ends at once."""

    @property
    def world_sizes(self) -> range:
        """Every number of workers that the run may have."""
        sizes = self.workers if isinstance(self.workers, tuple) else (self.workers,)
        return range(sizes[0], sizes[-1] + 1)

    @model_validator(mode="after")
    def _offload_fits(self) -> "TrainSection":
        stage, devices = self.zero_stage, (self.offload_optimizer, self.offload_parameters)
        if self.offload_optimizer == "cpu" and stage == 0:
            raise ConfigError("train.offload_optimizer cpu needs train.zero_stage 1 or more, not 0")
        if self.offload_optimizer == "nvme" and stage < 3:
            raise ConfigError(
                f"train.offload_optimizer nvme needs train.zero_stage 3, not {stage}: take "
                "zero_stage 3, or offload_optimizer cpu"
            )
        if self.offload_parameters != "none" and stage < 3:
            raise ConfigError(
                f"train.offload_parameters {self.offload_parameters} needs train.zero_stage 3, "
                f"not {stage}"
            )
        if ("nvme" in devices) != bool(self.nvme_path):
            missing = "train.nvme_path" if "nvme" in devices else "an offload to nvme"
            given = "an offload to nvme" if "nvme" in devices else "train.nvme_path"
            raise ConfigError(f"{given} is set without {missing}: give both or neither")
        return self

    @model_validator(mode="after")
    def _zero_plus_plus_fits(self) -> "TrainSection":
        plus = self.zero_plus_plus
        if plus.on and self.zero_stage < 3:
            raise ConfigError(
                f"train.zero_plus_plus needs train.zero_stage 3, not {self.zero_stage}"
            )
        if plus.quantized_weights and self.precision in ("fp32", "autocast"):
            raise ConfigError(
                f"train.zero_plus_plus.quantized_weights would round the fp32 weights of "
                f"train.precision {self.precision} to 8 bits: take precision bf16 or fp16"
            )
        if plus.quantized_gradients and self.precision != "fp16":
            # Its kernel reads any gradient as if it were fp16 (csrc/quantization/pt_binding.cpp).
            raise ConfigError(
                "train.zero_plus_plus.quantized_gradients needs train.precision fp16, not "
                f"{self.precision}"
            )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> "TrainSection":
        if self.compile and self.zero_stage == 3:
            raise ConfigError(
                "train.compile needs whole parameters: take train.zero_stage 2 or less, or "
                "compile false"
            )
        return self

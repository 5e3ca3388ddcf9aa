"""The options of `moa-serve train`. Light, so that `--help` answers at once: what loads torch is imported inside."""

from pathlib import Path
from typing import Annotated, Any

import typer

_DATA, _ADAPTER, _RUN, _OUT = "Data", "Adapter", "Training", "Result"


def _option(name: str, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, **more)


def train(
    data: Annotated[
        list[Path],
        _option(
            "--data",
            "JSON or JSON lines, or a folder with train.json; again for more. Rows: instruction, input, output; or chat messages.",
            _DATA,
            show_default=False,
        ),
    ],
    out: Annotated[Path, _option("--out", "Folder of the adapter.", _OUT, show_default=False)],
    validation_data: Annotated[
        list[Path] | None,
        _option(
            "--validation-data",
            "Files, or folders with validation.json, to hold out in place of a share of --data.",
            _DATA,
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str, _option("--form", "Of choice tasks: authors (numbered choices) or cloze (the text of the choice).", _DATA)
    ] = "authors",
    limit: Annotated[int | None, _option("--limit", "Take this many examples of each file, drawn by --seed.", _DATA, min=1)] = None,
    max_length: Annotated[
        int | None,
        _option("--max-length", "Longest example in tokens.", _DATA, min=2, show_default="300; 200 where all rows are choice questions"),
    ] = None,
    variant: Annotated[
        str, _option("--variant", "Family: soft_moa, sparse_moa, lora, molora, ... (see the README).", _ADAPTER)
    ] = "soft_moa",
    targets: Annotated[str, _option("--targets", "Base linears with a LoRA expert.", _ADAPTER)] = "Q,K,V,O,DOWN",
    rank: Annotated[int, _option("--rank", "Of each LoRA expert.", _ADAPTER, min=1)] = 8,
    alpha: Annotated[float | None, _option("--alpha", "A LoRA's scale is alpha / rank.", _ADAPTER, show_default="the rank")] = None,
    num_experts: Annotated[
        str,
        _option(
            "--num-experts", "At each linear, or inside each expert; for mola also several, as 2,4,6,8 from first to last layers.", _ADAPTER
        ),
    ] = "8",
    top_k: Annotated[int, _option("--top-k", "Experts that mola keeps.", _ADAPTER, min=1)] = 2,
    bottleneck: Annotated[
        int | None,
        _option("--bottleneck", "Hidden units of the parallel adapter, 0 for none.", _ADAPTER, min=0, show_default="16 where usual"),
    ] = None,
    prompt_length: Annotated[
        int | None, _option("--prompt-length", "Rows of the prompt expert, 0 for none.", _ADAPTER, min=0, show_default="10 where usual")
    ] = None,
    router_input: Annotated[str, _option("--router-input", "What a layer router reads: normed or residual.", _ADAPTER)] = "normed",
    router_net: Annotated[str, _option("--router-net", "swiglu or linear.", _ADAPTER)] = "swiglu",
    router_hidden: Annotated[int, _option("--router-hidden", "Hidden units of a SwiGLU router for each expert.", _ADAPTER, min=1)] = 4,
    activation: Annotated[str, _option("--activation", "Of soft_moa's router: sigmoid or softmax.", _ADAPTER)] = "sigmoid",
    threshold: Annotated[str, _option("--threshold", "Of sparse_moa: function (learned, per token) or constant.", _ADAPTER)] = "function",
    max_threshold: Annotated[
        float, _option("--max-threshold", "The constant, or the function's upper bound.", _ADAPTER, min=0, max=1)
    ] = 0.5,
    inner: Annotated[
        str | None, _option("--inner", "Nest: every expert is itself a molora or hydralora mixture.", _ADAPTER, show_default=False)
    ] = None,
    epochs: Annotated[int, _option("--epochs", "Passes over the data.", _RUN, min=1)] = 2,
    max_train_tokens: Annotated[
        int | None,
        _option("--max-train-tokens", "End after the step that reaches this many tokens.", _RUN, min=1, show_default="all epochs"),
    ] = None,
    batch_size: Annotated[int, _option("--batch-size", "Examples in a step.", _RUN, min=1)] = 32,
    micro_batch_tokens: Annotated[
        int,
        _option("--micro-batch-tokens", "Tokens in one forward; a longer step adds gradients up. Lower it for less memory.", _RUN, min=1),
    ] = 768,
    checkpointing: Annotated[bool, _option("--checkpointing", "Recompute activations in the backward: less memory, slower.", _RUN)] = False,
    learning_rate: Annotated[float, _option("--learning-rate", "Of AdamW, at its highest.", _RUN)] = 6e-3,
    weight_decay: Annotated[float, _option("--weight-decay", "Of AdamW.", _RUN, min=0)] = 0.0,
    warmup: Annotated[float, _option("--warmup", "Share of the steps in which the rate rises.", _RUN)] = 0.05,
    decay: Annotated[str, _option("--decay", "Of the rate: cosine, linear or none.", _RUN)] = "cosine",
    max_grad_norm: Annotated[float, _option("--max-grad-norm", "Gradients are cut to this norm.", _RUN)] = 1.0,
    threshold_grad: Annotated[
        str,
        _option(
            "--threshold-grad", "straight-through, or none: the authors' gradient, which leaves thresholds at their random start.", _RUN
        ),
    ] = "straight-through",
    threshold_tau: Annotated[float, _option("--threshold-tau", "Width of the straight-through estimator.", _RUN)] = 0.1,
    validation: Annotated[float, _option("--validation", "Share of the data to hold out.", _RUN)] = 0.05,
    evaluations: Annotated[int, _option("--evaluations", "How often in a run the held-out loss is computed.", _RUN, min=1)] = 10,
    patience: Annotated[int, _option("--patience", "End after so many evaluations without a better loss; 0 never.", _RUN, min=0)] = 3,
    seed: Annotated[int, _option("--seed", "Of first weights, batches and split.", _RUN)] = 0,
    model: Annotated[
        str | None, _option("--model", "Base: a folder, a GGUF file or a hub id.", _RUN, show_default="SmolLM2-135M-Instruct")
    ] = None,
    device: Annotated[str, _option("--device", "auto, cpu or cuda.", _RUN)] = "auto",
    dtype: Annotated[str, _option("--dtype", "To compute in: bfloat16 or float32.", _RUN)] = "bfloat16",
    resume: Annotated[bool, _option("--resume", "Go on from the state in the work folder, exactly as if never interrupted.", _RUN)] = False,
    work_dir: Annotated[
        Path | None, _option("--work-dir", "Folder of state and TensorBoard scalars.", _OUT, show_default="OUT.training")
    ] = None,
    save_dtype: Annotated[str, _option("--save-dtype", "Of the file: bfloat16 or float32.", _OUT)] = "bfloat16",
    description: Annotated[str | None, _option("--description", "One line for the manifest.", _OUT, show_default=False)] = None,
    license: Annotated[str | None, _option("--license", "Of the adapter, for the manifest.", _OUT, show_default=False)] = None,
) -> None:
    """Train an adapter of any family on the frozen base, and write it as a folder that serves.

    The defaults are the paper's (arXiv 2506.05928). The loss counts the response only, through the same module that serves. Exit code 2
    where the data, a flag or the base is wrong; 130 after Ctrl-C, and --resume goes on.
    """
    from moa_serve.errors import InvalidRequest
    from moa_serve.shell import terminal

    if form not in ("authors", "cloze"):
        raise InvalidRequest(f"form is {form!r}, but must be authors or cloze", param="form")
    if threshold_grad not in ("straight-through", "none"):
        raise InvalidRequest(f"threshold-grad is {threshold_grad!r}, but must be straight-through or none", param="threshold_grad")
    if threshold_grad == "none" and threshold_tau != 0.1:
        raise InvalidRequest("threshold-tau is the width of the straight-through estimator; --threshold-grad none has no use for it")
    counts = num_experts.split(",")
    if not all(count.strip().isdecimal() for count in counts):
        raise InvalidRequest(f"num-experts is {num_experts!r}, but must be a number, or several with commas", param="num_experts")

    with terminal.spinner("Loading torch"):
        from moa_serve.shell import train as view
        from moa_serve.train.loop import TrainSettings
        from moa_serve.train.recipe import Recipe
        from moa_serve.train.run import TrainingRun
        from moa_serve.train.run import train as run_training
    recipe = Recipe(
        variant=variant, targets=tuple(part.strip() for part in targets.split(",")), rank=rank, alpha=alpha,
        num_experts=tuple(map(int, counts)), top_k=top_k, bottleneck=bottleneck, prompt_length=prompt_length, router_input=router_input,
        router_net=router_net, router_hidden=router_hidden, activation=activation, threshold=threshold,
        max_threshold=max_threshold, inner=inner,
    )  # fmt: skip
    settings = TrainSettings(
        learning_rate=learning_rate, weight_decay=weight_decay, warmup=warmup, decay=decay, max_grad_norm=max_grad_norm,
        batch_size=batch_size, micro_batch_tokens=micro_batch_tokens, epochs=epochs, max_train_tokens=max_train_tokens,
        validation=validation, evaluations=evaluations, patience=patience,
        straight_through=threshold_tau if threshold_grad == "straight-through" else None, checkpointing=checkpointing, seed=seed,
    )  # fmt: skip
    run = TrainingRun(
        data=tuple(data), out=out, validation_data=tuple(validation_data or ()), limit=limit,
        form="cloze" if form == "cloze" else "authors",
        max_length=max_length, model=model, device=device, dtype=dtype, save_dtype=save_dtype, work_dir=work_dir, resume=resume,
        description=description, license=license, recipe=recipe, settings=settings,
    )  # fmt: skip
    trained = run_training(run, begin=lambda summary: view.watched(summary, out, run.state_dir))
    view.show(terminal.output(), trained)

"""The Sudoku runs of figures 3, 4 and 5. They share a folder, so that what one figure has trained the others find."""

from _runs import Run

STAGES = "--model.init_args.forward_process.init_args.num_stages"
THRESHOLD = "--model.init_args.forward_process.init_args.threshold"


def keep(every: int) -> tuple[str, ...]:
    """Flags that keep a checkpoint every so many optimizer steps, ``step=N.ckpt``."""
    callback = "--trainer.callbacks"
    return (
        f"{callback}+=ModelCheckpoint",
        f"{callback}.filename={{step}}",
        f"{callback}.save_top_k=-1",
        f"{callback}.every_n_train_steps={every}",
        f"{callback}.enable_version_counter=false",
    )


RUNS = {
    "cpu": {
        "mdm": Run("MDM", "configs/sudoku/small_mdm.yaml", keep(500)),
        "puma_k6": Run("PUMA, K 6", "configs/sudoku/small_puma.yaml", keep(500)),
        "puma_k3": Run("PUMA, K 3", "configs/sudoku/small_puma.yaml", (STAGES, "3", *keep(500))),
    },
    "gpu": {
        "mdm": Run("MDM", "configs/sudoku/mdm.yaml", keep(8000)),
        "puma": Run("PUMA", "configs/sudoku/puma.yaml", keep(8000)),
    },
}
EVERY_POLICY = ("--config", "experiments/policies.yaml")
SOLVED = {
    "cpu": ("val/solved/confidence_1", "val/solved/confidence_3", "val/solved/confidence_6"),
    "gpu": ("val/solved/confidence_1", "val/solved/confidence_2", "val/solved/confidence_3"),
}

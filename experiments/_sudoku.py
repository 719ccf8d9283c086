"""The Sudoku runs of figures 3, 4 and 5. They share a folder, so that what one figure has trained the others find."""

from _runs import Run

STAGES = "--model.init_args.forward_process.init_args.num_stages"
THRESHOLD = "--model.init_args.forward_process.init_args.threshold"
EVERY_POLICY = ("--config", "experiments/policies.yaml")


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


KEPT = {"cpu": keep(500), "gpu": keep(8000)}
RUNS = {
    "cpu": {
        "mdm": Run("MDM", "configs/sudoku/small_mdm.yaml", KEPT["cpu"]),
        "puma_k6": Run("PUMA, K 6", "configs/sudoku/small_puma.yaml", KEPT["cpu"]),
        "puma_k3": Run("PUMA, K 3", "configs/sudoku/small_puma.yaml", (STAGES, "3", *KEPT["cpu"])),
    },
    "gpu": {
        "mdm": Run("MDM", "configs/sudoku/mdm.yaml", KEPT["gpu"]),
        "puma": Run("PUMA", "configs/sudoku/puma.yaml", KEPT["gpu"]),
    },
}
PUMA = {"cpu": "puma_k6", "gpu": "puma"}  # drawn with the baseline in figures 3 and 4
SOLVED = {
    "cpu": ("val/solved/confidence_1", "val/solved/confidence_3", "val/solved/confidence_6"),
    "gpu": ("val/solved/confidence_1", "val/solved/confidence_2", "val/solved/confidence_3"),
}

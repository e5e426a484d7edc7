"""Stream the unlabelled images through the teacher (Ray Data); leaves candidate boxes in <run>/pseudo."""

from dfssd.cli import main, parse, run_stages


def job() -> None:
    config, _ = parse(__doc__ or "", ["run", "train", "pseudo"])
    run_stages(config, ["pseudo"])


if __name__ == "__main__":
    main(job)

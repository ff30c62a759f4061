"""Tasks through lm-eval: the same figures as it gives itself, and what is refused before anything is measured."""

import json
import socket
from pathlib import Path

import pytest
import torch

import command
import tiny
from secateur.errors import RequestError
from secateur.evaluation import ResultCard, evaluate, load_tasks, score
from secateur.evaluation.task_files import Asked, shipped, without_folders
from secateur.evaluation.task_table import score_rows, score_sentences
from secateur.evaluation.tasks import mean_error
from secateur.recipe import Recipe

ENDS = ("with a net", "over the sea", "in the morning", "near the old mill", "and then some more", "at once")


def piqa_rows(count: int = 12) -> list[dict]:
    """Questions that models without training answer differently from each other."""
    return [
        {
            "goal": f"Goal {i}: catch the {('train', 'bus', 'thief')[i % 3]}",
            "sol1": f"run {ENDS[i * i % 6]}",
            "sol2": f"walk {ENDS[(i + 2) % 6]}",
            "label": i * i % 5 % 2,
        }
        for i in range(count)
    ]


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    return lines(tmp_path / "piqa" / "validation.jsonl", piqa_rows())


def yaml(tmp_path: Path, text: str, data: Path | None = None) -> Path:
    """A definition of one's own: four entries that every task needs, and `text`."""
    where = "" if data is None else f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
    base = f"task: mine\nvalidation_split: validation\noutput_type: multiple_choice\n{where}"
    file = tmp_path / "mine.yaml"
    file.write_text(base + text, encoding="utf-8")
    return file


OF_PIQA = (
    'doc_to_text: "{{goal}}"\ndoc_to_choice: "{{[sol1, sol2]}}"\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n'
)


def test_scores_are_those_of_lm_eval_to_the_last_digit(
    piqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.evaluator.add_env_info", lambda results: None
    )  # asks pip for everything that is installed
    monkeypatch.chdir(tmp_path)
    file = Path("piqa.yaml")
    shared = (Path(__file__).parents[1] / "src/secateur/evaluation/definitions/piqa.yaml").read_text()
    # examples before each question, so that what is drawn must agree too
    few = lines(tmp_path / "piqa" / "train.jsonl", piqa_rows(7)[3:])
    file.write_text(
        shared.replace("validation: piqa/validation.jsonl", f"validation: piqa/validation.jsonl\n    train: {few}")
        + "num_fewshot: 2\n"
    )
    module, words = tiny.make("llama"), tiny.tokenizer()
    manager = TaskManager(include_defaults=False)
    theirs = simple_evaluate(
        model=HFLM(pretrained=module, tokenizer=tiny.tokenizer()), tasks=[str(file)], task_manager=manager, limit=9
    )["results"]["piqa"]
    ours = {each.metric: each for each in score(load_tasks([str(file)], limit=9), module, words)}
    assert set(ours) == {"acc", "acc_norm"}
    for metric, found in ours.items():
        assert found.value == theirs[f"{metric},none"] and found.stderr == theirs[f"{metric}_stderr,none"]
        assert (found.n, found.of, found.shots) == (9, 12, 2)
    assert {found.value for found in ours.values()} != {0.0}, "nothing was answered, so equality says little"


def test_data_by_file_and_by_folder_is_the_same(piqa: Path, tmp_path: Path) -> None:
    module, words = tiny.make("llama"), tiny.tokenizer()
    scores = [score(load_tasks([f"piqa={place}"]), module, words) for place in (piqa, piqa.parent, tmp_path)]
    assert scores[0] == scores[1] == scores[2]
    [acc, _] = scores[0]
    assert (
        acc.n == acc.of == 12 and list(acc.source.data) == ["validation.jsonl"] and acc.source.definition == "piqa.yaml"
    )


def test_the_error_of_a_change_is_that_of_its_questions(piqa: Path) -> None:
    modules = [(tiny.make("llama", seed), tiny.tokenizer()) for seed in (0, 1)]
    tasks = load_tasks([f"piqa={piqa}"])
    [both, _] = score(tasks, *modules[0], modules[1])
    alone = [score(tasks, *each)[0] for each in modules]
    assert (both.value, both.stderr) == (alone[0].value, alone[0].stderr)
    assert (both.reference, both.reference_stderr) == (alone[1].value, alone[1].stderr)
    [same, _] = score(tasks, *modules[0], modules[0])
    assert same.change_stderr == 0.0 and both.change_stderr > 0.0


def test_mean_error_by_hand() -> None:
    assert mean_error([1.0, 0.0, 1.0, 0.0]) == pytest.approx((1 / 3) ** 0.5 / 2)


def test_shipped_templates_say_what_lm_evals_own_code_says(tmp_path: Path) -> None:
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs
    from lm_eval.tasks.winogrande import preprocess_winogrande as own

    rows = [
        {"activity_label": "Baking [a] cake", "ctx_a": "[header] How to bake [title] Start", "ctx_b": "a MAN stirs  it",
         "endings": [" one [title] two.", "three [x] four", "it's \"five\"", "six\n seven"], "label": "2"},
        {"activity_label": "Running", "ctx_a": "They run.", "ctx_b": "", "endings": ["a", "b", "c", "d"], "label": "0"},
    ]  # fmt: skip
    [task] = load_tasks([f"hellaswag={lines(tmp_path / 'h.jsonl', rows)}"]).asked.values()
    task = task["tasks"]["hellaswag"]
    for row, done in zip(task.eval_docs, process_docs(Dataset.from_list(rows)), strict=True):
        assert task.doc_to_text(row) == done["query"]
        assert task.doc_to_choice(row) == done["choices"] and task.doc_to_target(row) == done["gold"]
    rows = [
        {
            "sentence": "The cup did not fit the box as the _ was big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        {"sentence": "Ann's sister called, so _ went.", "option1": "Ann", "option2": "she", "answer": "2"},
    ]
    [task] = load_tasks([f"winogrande={lines(tmp_path / 'w.jsonl', rows)}"]).asked.values()
    task = task["tasks"]["winogrande"]
    for row in rows:
        assert task.doc_to_text(row) == own.doc_to_text(row) and task.doc_to_target(row) == own.doc_to_target(row)
        assert task.doc_to_choice(row) == own.doc_to_choice(row)


FILES = {
    "piqa": piqa_rows(3),
    "arc_easy": [{"question": "Why?", "choices": {"text": ["so", "or"], "label": ["1", "2"]}, "answerKey": "2"}],
    "arc_challenge": [{"question": "Why?", "choices": {"text": ["so", "or"], "label": ["A", "B"]}, "answerKey": "B"}],
    "hellaswag": [{"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": 3}],
    "winogrande": [{"sentence": "So _ it.", "option1": "is", "option2": "was", "answer": "2"}],
    "boolq": [{"passage": "All.", "question": "is it", "answer": True}],
    "mmlu": [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "high_school"}],
}


def test_every_shipped_definition_reads_its_layout(tmp_path: Path) -> None:
    specs = [f"{name}={lines(tmp_path / f'{name}.jsonl', rows)}" for name, rows in FILES.items()]
    for name, text in (("one", "What is 1/2?,0.50,2,3,4,A\n"), ("two", '"Red, or?",yes,no,NA,so,D\n')):
        (tmp_path / "csv" / "test").mkdir(parents=True, exist_ok=True)
        (tmp_path / "csv" / "test" / f"{name}_test.csv").write_text(text)
    tasks = load_tasks([*specs, f"mmlu_csv={tmp_path / 'csv'}"])
    assert sorted(tasks.sources) == shipped()
    right = {}
    for found in tasks.asked.values():
        for name, task in found["tasks"].items():
            row = task.eval_docs[len(task.eval_docs) - 1]
            gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
            right[name] = gold if isinstance(gold, str) else task.doc_to_choice(row)[gold]
    assert right == {
        "piqa": piqa_rows(3)[2]["sol1"], "arc_easy": "or", "arc_challenge": "or", "hellaswag": "g", "winogrande": "So was",
        "boolq": "yes", "mmlu": "D", "mmlu_csv": "D",
    }  # fmt: skip
    csv = next(found for spec, found in tasks.asked.items() if spec.startswith("mmlu_csv"))["tasks"]["mmlu_csv"]
    prompts = [csv.doc_to_text(row) for row in csv.eval_docs]
    assert "A. 0.50\n" in prompts[0] and "C. NA\n" in prompts[1], "columns are text as it stands"


def refused(specs: list[str], **options: object) -> str:
    with pytest.raises(RequestError) as caught:
        load_tasks(specs, **options)
    said = str(caught.value)
    assert "\n" not in said and said.endswith((".", "?", ")"))
    return said


def test_what_is_not_there_or_does_not_fit_is_named(piqa: Path, tmp_path: Path) -> None:
    assert "no task at" in refused([str(tmp_path / "none.yaml")])
    assert "no data for the task piqa" in refused([f"piqa={tmp_path / 'none.jsonl'}"])
    assert "Did you mean 'piqa'" in refused([f"pipa={piqa}"])
    assert "names no task" in refused(["piqa="])
    assert "asked for twice" in refused([f"piqa={piqa}", f"piqa={piqa.parent}"])
    assert "at least 1" in refused([f"piqa={piqa}"], limit=0)
    said = refused([f"hellaswag={piqa}"])
    assert "'ctx_b' is undefined" in said
    assert "goal, sol1, sol2, label" in said
    said = refused(
        [f"mmlu={lines(tmp_path / 'm.jsonl', [{'question': 'Q', 'choices': list('abcd'), 'subject': 's'}])}"]
    )
    assert "no column 'answer'" in said and "question, choices, subject" in said
    assert "row 2" in refused([f"piqa={lines(tmp_path / 'l.jsonl', [*piqa_rows(1), {**piqa_rows(1)[0], 'label': 2}])}"])
    said = refused([f"piqa={lines(tmp_path / 'e.jsonl', [])}"])
    assert "cannot be read" in said or "holds no questions" in said
    (tmp_path / "broken.jsonl").write_text('{"goal": 1,\n')
    assert "cannot be read" in refused([f"piqa={tmp_path / 'broken.jsonl'}"])
    (tmp_path / "data.txt").write_text("x")
    assert ".jsonl" in refused([f"piqa={tmp_path / 'data.txt'}"])
    (tmp_path / "empty").mkdir()
    assert "no validation split" in refused([f"piqa={tmp_path / 'empty'}"])
    assert "which is not there" in refused([str(yaml(tmp_path, OF_PIQA, tmp_path / "gone.jsonl"))])
    (tmp_path / "odd.yaml").write_text("task: [\n")
    assert "not valid YAML" in refused([str(tmp_path / "odd.yaml")])
    (tmp_path / "odd.yaml").write_text("group: all\ntask: [a, b]\n")
    assert "one by one" in refused([str(tmp_path / "odd.yaml")])


def test_lm_eval_must_be_there(piqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.evaluation.task_files.find_spec", lambda name: None)
    assert "pip install 'secateur[tasks]'" in refused([f"piqa={piqa}"])
    assert not load_tasks([]), "nobody who asks no task needs it"


def test_nothing_foreign_runs_unless_it_is_trusted(piqa: Path, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef text(row): return 'x'\n"
    )
    function = OF_PIQA.replace('"{{goal}}"', "!function code.text")
    file = yaml(tmp_path, function, piqa)
    assert "!function code.text" in refused([str(file)]) and not (tmp_path / "ran").exists()
    # not by way of a file that it includes either
    (tmp_path / "outer.yaml").write_text("include: mine.yaml\ntask: outer\n")
    assert "!function" in refused([str(tmp_path / "outer.yaml")]) and not (tmp_path / "ran").exists()
    [task] = load_tasks([str(file)], trust_remote_code=True).asked.values()
    assert (tmp_path / "ran").exists() and task["tasks"]["mine"].doc_to_text({}) == "x"

    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert "SecurityError" in refused([str(yaml(tmp_path, OF_PIQA.replace("{{goal}}", reach), piqa))])
    assert load_tasks([str(yaml(tmp_path, OF_PIQA.replace("{{goal}}", reach), piqa))], trust_remote_code=True)

    metric = OF_PIQA.replace("metric: acc", "metric: rouge")
    assert "'rouge' is not one of lm-eval's own" in refused([str(yaml(tmp_path, metric, piqa))])
    metric = OF_PIQA.replace("metric: acc", "metric: acc, hf_evaluate: true")
    assert "hf_evaluate" in refused([str(yaml(tmp_path, metric, piqa))])
    assert "use_prompt" in refused([str(yaml(tmp_path, OF_PIQA + "use_prompt: 'x.yaml:y'\n", piqa))])
    assert "unsafe_code" in refused([str(yaml(tmp_path, OF_PIQA + "unsafe_code: true\n", piqa))])


def test_local_tasks_use_no_network_and_no_cache(piqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants
    from lm_eval import utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    used = []

    def connect(*arguments: object) -> None:
        used.append(arguments)  # the datasets library goes on where it cannot count what was loaded
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    before, plain = command.snapshot(tmp_path), utils.env
    draws = torch.random.get_rng_state()
    module, words = tiny.make("llama"), tiny.tokenizer()
    words.pad_token = None
    module.train()
    score(load_tasks([f"piqa={piqa}"], limit=2), module, words)
    assert not used and command.snapshot(tmp_path) == before
    # what was changed meanwhile is as it was
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False and utils.env is plain
    assert module.training and words.pad_token is None and torch.equal(torch.random.get_rng_state(), draws)


def test_tasks_on_the_card(piqa: Path) -> None:
    pair = [(tiny.make("llama", seed), tiny.tokenizer()) for seed in (0, 1)]
    card = evaluate(*pair, tasks=[f"piqa={piqa}"], limit=5, speed=False, windows=1, window=16)
    assert ResultCard.from_dict(json.loads(card.to_json())) == card
    assert "lm-eval" in card.versions
    rows = score_rows(card)
    acc = card.tasks[0]
    assert rows[0][0] == "piqa acc" and rows[0][2] == f"{acc.value:.4f} ± {acc.stderr:.4f}"
    assert rows[0][3].startswith(f"{acc.value - acc.reference:+.4f}")
    assert "the first 5 of 12 questions" in score_sentences(card)[0]


def test_the_command_line_and_recipes_refuse_before_anything_is_written(model, piqa: Path, tmp_path: Path) -> None:
    told = command.secateur("evaluate", model("llama"), "--tasks", tmp_path / "none.yaml")
    assert told.code == 2 and "no task at" in told.err
    told = command.secateur("evaluate", model("llama"), "--kick")
    assert told.code == 2 and "--reference" in told.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"steps: [random_units: {{ratio: 0.2}}]\nevaluate: {{tasks: ['hellaswag={piqa}']}}\n")
    for more in ([], ["--dry-run"]):
        told = command.secateur(
            "compress", model("llama"), "--recipe", recipe, "--output", tmp_path / "out", "--quiet", *more
        )
        assert told.code == 2 and "does not fit its data" in told.err and not (tmp_path / "out").exists()


def test_specs() -> None:
    assert Asked.parse("arc_easy") == Asked("arc_easy", "arc_easy", None, None)
    assert [without_folders(spec) for spec in ("piqa=/a/b.jsonl", "/x/y.yaml=c/d", "mmlu")] == [
        "piqa=b.jsonl",
        "y.yaml=d",
        "mmlu",
    ]
    recipe = Recipe.parse({"steps": ["magnitude"], "evaluate": {"tasks": ["piqa=x.jsonl"], "limit": 3, "kick": True}})
    assert Recipe.parse(recipe.plain()) == recipe


@pytest.mark.every
def test_a_recipe_measures_tasks_and_facts(model, piqa: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"steps: [random_units: {{ratio: 0.2}}]\nevaluate: {{tasks: ['piqa={piqa}'], limit: 3, kick: true, window: 32}}\n"
    )
    told = command.secateur("compress", model("llama"), "--recipe", recipe, "--output", tmp_path / "out", "--quiet")
    assert told.code == 0, told.err
    card = json.loads((tmp_path / "out" / "secateur.json").read_text())["card"]
    assert [each["metric"] for each in card["tasks"]] == ["acc", "acc_norm"] and card["tasks"][0]["n"] == 3
    assert len(card["kick"]["scores"]) == 6
    assert "piqa acc" in told.out and "kick: closed book" in told.out
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "piqa=validation.jsonl" in readme and str(tmp_path) not in readme

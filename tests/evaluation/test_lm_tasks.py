"""lm-eval in memory: the bundled task, scores with their documents, and paired comparison."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from paredown.compress.errors import PareError
from paredown.compress.text import stdlib_text
from paredown.compress.text.windows import special_prefix
from paredown.evaluation.lm_tasks import check_tasks, run_tasks
from paredown.evaluation.reference import model_path
from paredown.evaluation.tables import task_rows
from paredown.evaluation.task_index import task_manager
from paredown.evaluation.task_scores import Score, TaskScores, compare_tasks
from paredown.evaluation.tasks import stdlib_lines

EOS = 256


def byte_tokenizer(template=None):
    """One token a byte; `template` says which special tokens the tokenizer adds to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<eos>": EOS, "<a>": 257}
    bytes_ = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, **special}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    if template:
        bytes_.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(special.items()))
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<eos>", bos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tiny(seed=0, positions=1024):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=258)
    config = LlamaConfig(**sizes, max_position_embeddings=positions, bos_token_id=256, eos_token_id=256)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def questions():
    return stdlib_lines.questions()


@pytest.fixture
def folder(tmp_path):
    """A user's folder: multiple choice, perplexity, a group with a score, one without, Python that leaves a mark."""
    choices = [{"q": f"{i} and", "choices": [f"{i}", "x", f"{i} {i}"], "answer": i % 3} for i in range(9)]
    pages = [{"page": "the cat sat on the mat " * (i + 2)} for i in range(4)]
    for name, rows in (("mc", choices), ("ppl", pages)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files: {{test: {}}}\n"
    metric = "metric_list:\n  - {{metric: {}, aggregation: {}, higher_is_better: true}}\n"
    choice = (
        data.format(tmp_path / "mc.jsonl")
        + "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        + metric.format("acc", "mean")
    )
    rolling = (
        data.format(tmp_path / "ppl.jsonl")
        + "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: page\n"
        + metric.format("word_perplexity", "weighted_perplexity")
    )
    (tmp_path / "mark.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'a').write('x')\ndef text(doc): return 'q'\n")
    files = {
        "own_choice": "task: own_choice\n" + choice,
        "own_twin": "task: own_twin\n" + choice,
        "own_pages": "task: own_pages\n" + rolling,
        "own_far": "task: own_far\n" + choice.replace("dataset_path: json", "dataset_path: nobody/nothing-at-all"),
        "own_group": "group: own_group\ntask: [own_choice, own_twin]\naggregate_metric_list:\n  - metric: acc\n",
        "own_bag": "group: own_bag\ntask: [own_choice, own_pages]\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def coded(folder):
    """The same folder with a task whose text comes from Python."""
    text = (folder / "own_choice.yaml").read_text()
    text = text.replace("doc_to_text: q", "doc_to_text: !function mark.text").replace(
        "task: own_choice", "task: own_code"
    )
    (folder / "own_code.yaml").write_text(text)
    return folder


# The bundled task


def test_each_question_continues_its_module_and_wrong_choices_are_lines_of_it(questions):
    lines = {
        d.module: [x.rstrip() for x in d.text.expandtabs().splitlines()] for d in stdlib_text.documents("evaluation")
    }
    for question in questions:
        module = lines[question["module"]]
        passage = [*question["context"].split("\n"), question["choices"][question["answer"]]]
        assert any(module[i : i + len(passage)] == passage for i in range(len(module)))
        assert set(question["choices"]) <= set(module)


def test_choices_are_distinct_equally_deep_and_of_like_length(questions):
    for question in questions:
        choices, truth = question["choices"], question["choices"][question["answer"]].strip()
        assert len({choice.strip() for choice in choices}) == 4
        assert len({len(choice) - len(choice.lstrip()) for choice in choices}) == 1
        tolerance = stdlib_lines.LENGTH_TOLERANCE * len(truth)
        assert all(abs(len(choice.strip()) - len(truth)) <= tolerance for choice in choices)
        assert not {c.strip() for c in question["context"].split("\n")} & {c.strip() for c in choices}


def test_questions_are_many_spread_over_modules_and_their_answers_over_the_places(questions):
    modules = Counter(question["module"] for question in questions)
    assert len(questions) == stdlib_lines.DOCUMENTS
    assert len(modules) >= 20 and max(modules.values()) <= stdlib_lines.PER_MODULE
    assert set(modules) <= {document.module for document in stdlib_text.documents("evaluation")}
    places = Counter(question["answer"] for question in questions)
    assert min(places.values()) > 0.18 * len(questions)


def test_length_alone_does_not_give_the_answer_away(questions):
    for pick in (min, max):
        guesses = [pick(range(4), key=lambda i, q=q: len(q["choices"][i])) == q["answer"] for q in questions]
        assert sum(guesses) / len(guesses) < 0.35


def test_another_process_with_another_hash_seed_asks_the_same(questions):
    code = "import json; from paredown.evaluation.tasks.stdlib_lines import questions; print(json.dumps(questions(60)))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == questions[:60]


def test_the_bundled_model_is_far_above_chance():
    tokenizer, model = (kind.from_pretrained(model_path()) for kind in (AutoTokenizer, AutoModelForCausalLM))
    score = run_tasks(model, tokenizer, ["stdlib_lines"], limit=100)
    assert score.scores["stdlib_lines"]["acc"].value > 0.25 + 3 * score.scores["stdlib_lines"]["acc"].stderr
    assert score.notes == ()  # no context was cut to the model's 512 tokens


# Scores


def test_accuracy_is_what_slow_loops_over_likelihoods_say(tokenizer, questions):
    model = tiny()
    scores = run_tasks(model, tokenizer, ["stdlib_lines"], limit=6).scores["stdlib_lines"]
    right, right_by_length = [], []
    for question in questions[:6]:
        totals = []
        for choice in question["choices"]:
            context, whole = question["context"], f"{question['context']}\n{choice}"
            start, ids = len(tokenizer(context).input_ids), torch.tensor([tokenizer(whole).input_ids])
            with torch.no_grad():
                log_p = model(ids).logits.double().log_softmax(-1)
            totals.append(sum(log_p[0, at - 1, ids[0, at]].item() for at in range(start, ids.shape[1])))
        by_length = [total / len(choice) for total, choice in zip(totals, question["choices"], strict=True)]
        right.append(float(totals.index(max(totals)) == question["answer"]))
        right_by_length.append(float(by_length.index(max(by_length)) == question["answer"]))
    assert scores["acc"].samples == tuple(right)
    assert scores["acc_norm"].samples == tuple(right_by_length)
    assert scores["acc"].value == pytest.approx(sum(right) / 6)


def test_a_task_whose_metric_is_no_mean_keeps_no_samples_and_has_no_paired_error(tokenizer, folder):
    scores = run_tasks(tiny(), tokenizer, ["own_pages"], include=folder)
    assert scores.scores["own_pages"]["word_perplexity"].samples is None
    entry = compare_tasks(scores, scores)["own_pages"]["word_perplexity"]
    assert entry["paired_stderr"] is None and entry["correct_to_wrong"] is None


def test_a_group_with_a_score_stands_for_its_tasks_and_one_without_shows_them(tokenizer, folder):
    found = run_tasks(tiny(), tokenizer, ["own_group"], include=folder)
    assert list(found.scores) == ["own_group"] and len(found.documents["own_group"]) == 18
    assert len(found.scores["own_group"]["acc"].samples) == 18
    assert set(run_tasks(tiny(), tokenizer, ["own_bag"], include=folder).scores) == {"own_choice", "own_pages"}


def test_the_callers_tokenizer_is_left_as_it_was(tokenizer, folder):
    run_tasks(tiny(), tokenizer, ["own_choice"], include=folder)
    assert tokenizer.pad_token is None


def test_a_model_that_answers_nan_is_refused_instead_of_scored(tokenizer, folder):
    model = tiny()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(PareError, match="NaN"):
        run_tasks(model, tokenizer, ["own_choice"], include=folder)


def test_truncated_contexts_are_remarked_once(tokenizer):
    scores = run_tasks(tiny(positions=96), tokenizer, ["stdlib_lines"], limit=3)
    (note,) = [note for note in scores.notes if "maximum length" in note]
    assert note.endswith("alike)")


def test_no_remarks_where_nothing_happened_and_nothing_for_no_tasks(tokenizer, folder):
    assert run_tasks(tiny(), tokenizer, ["own_choice"], include=folder).notes == ()
    assert run_tasks(None, None, []).scores == {}


def test_summary_is_json_with_counts(tokenizer, folder):
    summary = run_tasks(tiny(), tokenizer, ["own_choice"], include=folder, limit=4).summary()
    assert json.loads(json.dumps(summary))["own_choice"]["acc"]["documents"] == 4


# The special tokens before a text


def inputs_of(model, *args, **options):
    """All rows that the model reads while tasks are run, and the scores."""
    rows = []
    hook = model.register_forward_pre_hook(lambda module, given: rows.extend(given[0].tolist()))
    scores = run_tasks(model, *args, **options)
    hook.remove()
    return rows, scores


@pytest.mark.parametrize(
    ("template", "opening", "positions"),
    [("<eos> $A", [EOS], 24), ("<eos> $A <eos>", [EOS], 1024), ("<a> <eos> $A", [257, EOS], 24)],
)
def test_every_input_begins_with_the_tokens_that_the_tokenizer_puts_before_a_text(template, opening, positions, folder):
    names = ["own_choice", "own_pages"]
    rows, scores = inputs_of(tiny(positions=positions), byte_tokenizer(template), names, include=folder)
    assert rows and all(row[: len(opening)] == opening for row in rows)
    # right of that, only lm-eval's padding (0) beside the bytes of the text
    assert all(max(row[len(opening) :]) < EOS and len(row) <= positions for row in rows)
    assert scores.bos == scores.summary()["own_choice"]["acc"]["bos"] == "every context"
    assert compare_tasks(scores, scores)["own_pages"]["word_perplexity"]["bos"] == "every context"
    for shown in (scores.summary(), compare_tasks(scores, scores)):
        assert task_rows(shown).notes == ("Tasks: BOS token: every context",)


def test_without_a_bos_of_the_tokenizer_or_of_the_recipe_there_is_none(folder):
    for tokenizer, bos in ((byte_tokenizer(), "auto"), (byte_tokenizer("<eos> $A <eos>"), "none")):
        rows, scores = inputs_of(tiny(), tokenizer, ["own_choice"], include=folder, bos=bos)
        assert not any(EOS in row for row in rows) and scores.bos == "none"


def test_inputs_without_special_tokens_are_those_of_lm_eval_itself(folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from paredown.evaluation import lm_model

    ours, _ = inputs_of(tiny(positions=24), byte_tokenizer(), ["own_choice", "own_pages"], include=folder)
    monkeypatch.setattr(
        lm_model,
        "PrefixedLM",
        lambda model, tokenizer, size, _: HFLM(model, "causal", tokenizer=tokenizer, batch_size=size),
    )
    theirs, _ = inputs_of(tiny(positions=24), byte_tokenizer(), ["own_choice", "own_pages"], include=folder)
    assert ours == theirs


@pytest.mark.parametrize("template", ["<eos> $A", "<a> <eos> $A"])
def test_a_rolling_likelihood_is_what_slow_loops_over_windows_say(template):
    from paredown.evaluation.lm_model import PrefixedLM

    model, tokenizer, text = tiny(positions=16), byte_tokenizer(template), "the cat sat on the mat and the dog ran"
    opening = list(special_prefix(tokenizer))
    lm = PrefixedLM(model, tokenizer, 2, opening)
    (found,) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    ids, room, total = list(tokenizer(text, add_special_tokens=False).input_ids), 16 - len(opening) + 1, 0.0
    for start in range(0, len(ids), room):
        predicted = ids[start : start + room]
        # the last window is filled up with what stands before it
        begin = start if start + room <= len(ids) else len(ids) - room
        row = [*opening, *ids[begin : start + len(predicted)]]
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        total += sum(log_p[at - 1, row[at]].item() for at in range(len(row) - len(predicted), len(row)))
    assert found == pytest.approx(total, rel=1e-5)


def test_a_batch_of_prompts_is_cut_behind_the_bos():
    from paredown.evaluation.lm_model import PrefixedLM

    tokenizer = byte_tokenizer("<eos> $A")
    lm = PrefixedLM(tiny(), tokenizer, 2, [EOS])
    ids, mask = lm.tok_batch_encode(["abcdef", "xy"], left_truncate_len=5)
    assert tokenizer.decode(ids[0][1:]) == "cdef" and ids[0][0] == EOS
    assert mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1]] and tokenizer.decode(ids[1][-3:]) == "<eos>xy"
    assert (
        lm.tok_encode("<eos>abc")
        == lm.tok_encode("abc")
        == [EOS, *tokenizer("abc", add_special_tokens=False).input_ids]
    )


def test_a_token_without_an_embedding_is_told(folder):
    model = tiny()
    model.resize_token_embeddings(50)
    with pytest.raises(PareError, match="embedding has 50 rows"):
        run_tasks(model, byte_tokenizer(), ["own_choice"], include=folder)


# Comparison


def scored(samples, stderr=0.1, name="t"):
    documents = tuple(f"{name}:{i}" for i in range(len(samples)))
    return TaskScores({name: {"acc": Score(sum(samples) / len(samples), stderr, tuple(samples))}}, {name: documents})


def test_paired_error_and_flips_match_the_formula_for_binary_answers():
    before, after = [1.0, 1, 1, 0, 0, 1, 0, 1], [1.0, 0, 0, 1, 0, 0, 0, 1]
    entry = compare_tasks(scored(before), scored(after))["t"]["acc"]
    n, lost, won = 8, 3, 1
    assert (entry["correct_to_wrong"], entry["wrong_to_correct"]) == (lost, won)
    variance = ((lost + won) - (lost - won) ** 2 / n) / (n - 1)
    assert entry["paired_stderr"] == pytest.approx(math.sqrt(variance / n))
    assert (entry["before"], entry["after"], entry["stderr_before"]) == (5 / 8, 3 / 8, 0.1)


def test_a_model_against_itself_differs_by_exactly_nothing(tokenizer, folder):
    scores = run_tasks(tiny(), tokenizer, ["own_choice"], include=folder)
    entry = compare_tasks(scores, scores)["own_choice"]["acc"]
    assert (entry["paired_stderr"], entry["correct_to_wrong"], entry["wrong_to_correct"]) == (0.0, 0, 0)


def test_graded_scores_have_a_paired_error_but_no_flips():
    entry = compare_tasks(scored([0.5, 0.25]), scored([0.25, 0.5]))["t"]["acc"]
    assert entry["paired_stderr"] > 0 and entry["correct_to_wrong"] is None


def test_different_documents_or_tasks_are_not_compared():
    with pytest.raises(PareError, match="same questions"):
        compare_tasks(scored([1.0, 0.0]), scored([1.0]))
    with pytest.raises(PareError, match="same questions"):
        compare_tasks(scored([1.0]), scored([1.0], name="u"))


# Names, folders, faults


def test_our_task_is_known_without_indexing_those_of_lm_eval():
    check_tasks(["stdlib_lines"])
    check_tasks([])
    assert task_manager(["stdlib_lines"]).all_tasks == ["stdlib_lines"]


def test_a_users_group_is_known_without_indexing_those_of_lm_eval_unless_it_names_one_of_them(folder):
    assert "hellaswag" not in task_manager(["own_group", "own_bag"], folder).all_tasks
    (folder / "mixed.yaml").write_text("group: own_mixed\ntask: [own_choice, own_inner]\n")
    (folder / "inner.yaml").write_text("group: own_inner\ntask: [hellaswag]\n")
    assert "hellaswag" in task_manager(["own_mixed"], folder).all_tasks


def test_unknown_names_are_all_listed_with_a_suggestion_and_a_path_is_no_name(coded):
    with pytest.raises(PareError) as fault:
        check_tasks(["stdlib_line", "helaswag", str(coded / "own_code.yaml")])
    assert "Did you mean 'stdlib_lines'?" in str(fault.value)
    assert "Did you mean 'hellaswag'?" in str(fault.value)
    assert "own_code.yaml" in str(fault.value)
    assert not (coded / "MARK").exists()


def test_code_of_a_users_folder_is_refused_unless_it_is_allowed(tokenizer, coded):
    for refused in (
        lambda: check_tasks(["own_choice"], include=coded),
        lambda: run_tasks(tiny(), tokenizer, ["own_code"], include=coded, limit=1),
    ):
        with pytest.raises(PareError, match=r"own_code.yaml names code.*!function mark.text.*--allow-task-code"):
            refused()
    check_tasks(["own_code"], include=coded, allow_code=True)
    assert not (coded / "MARK").exists()
    run_tasks(tiny(), tokenizer, ["own_code"], include=coded, allow_code=True, limit=1)
    assert (coded / "MARK").exists()


@pytest.mark.parametrize(
    "text",
    [
        "task: t\ndoc_to_text: !<!function> mark.text\n",
        "%TAG ! !\n---\ntask: t\ndoc_to_text: !function mark.text\n",
        "group: g\ntask: [{task: t, doc_to_text: !function mark.text}]\n",
        "include: ../outside\ntask: t\n",
        "group: g\ntask: [{include: [../outside], task: t}]\n",
        "task: t\nmetric_list: [{metric: somebody/script, hf_evaluate: true}]\n",
    ],
)
def test_code_is_found_however_it_is_written(tmp_path, text):
    (tmp_path / "outside").write_text("doc_to_text: !function mark.text\n")
    (tmp_path / "tasks" / "deep").mkdir(parents=True)
    (tmp_path / "tasks" / "deep" / "t.yaml").write_text(text.replace("../outside", "../../outside"))
    with pytest.raises(PareError, match="names code"):
        check_tasks(["stdlib_lines"], include=tmp_path / "tasks")


def test_a_template_of_a_users_task_reaches_no_python(tokenizer, folder):
    text = (folder / "own_choice.yaml").read_text()
    evil = 'doc_to_text: "{{ q.__class__.__mro__[1].__subclasses__()|length }}"'
    (folder / "own_choice.yaml").write_text(text.replace("doc_to_text: q", evil))
    with pytest.raises(Exception, match="unsafe"):
        run_tasks(tiny(), tokenizer, ["own_choice"], include=folder, limit=1)


def test_data_that_cannot_be_had_is_a_fault_and_can_be_found_before_the_weights(tokenizer, folder):
    check_tasks(["own_far"], include=folder)
    with pytest.raises(PareError, match=r"own_far.*needs the network"):
        check_tasks(["own_far"], include=folder, data=True)
    with pytest.raises(PareError, match=r"own_far.*needs the network"):
        run_tasks(tiny(), tokenizer, ["own_far"], include=folder)


def test_missing_folder_and_senseless_limit_are_refused(tokenizer, tmp_path):
    with pytest.raises(PareError, match="does not exist"):
        check_tasks(["x"], include=tmp_path / "nowhere")
    with pytest.raises(PareError, match="at least 1"):
        run_tasks(tiny(), tokenizer, ["stdlib_lines"], limit=0)


def test_without_lm_eval_the_message_says_how_to_install_it(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PareError, match="pip install 'lm-eval"):
        check_tasks(["stdlib_lines"])


def test_importing_the_module_does_not_import_lm_eval():
    code = "import sys, paredown.evaluation.lm_tasks; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""`--tasks bias`: three tasks by one name, which a folder can hold too."""

import json

from paredown.evaluation.lm_tasks import check_tasks, run_tasks
from paredown.evaluation.task_index import NAMED, expanded
from paredown.evaluation.task_scores import compare_tasks


def test_bias_stands_for_its_tasks_once():
    assert expanded(["piqa", "bias", "toxigen"]) == ("piqa", *NAMED["bias"])


def test_the_bias_tasks_of_a_folder_are_scored_one_by_one(tmp_path, dense, tokenizer):
    rows = [{"q": f"{i} and", "choices": [f"{i}", "x"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in NAMED["bias"]:
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n"
            f"  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\noutput_type: multiple_choice\ndoc_to_text: q\n"
            "doc_to_choice: choices\ndoc_to_target: answer\n"
            "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        )
    assert set(check_tasks(("bias",), tmp_path, data=True)) == set(NAMED["bias"])
    scores = run_tasks(dense, tokenizer, ["bias"], include=tmp_path)
    compared = compare_tasks(scores, scores)
    assert set(compared) == set(NAMED["bias"]) and all(s["acc"]["correct_to_wrong"] == 0 for s in compared.values())

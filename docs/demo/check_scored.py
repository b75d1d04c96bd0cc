"""Compare predicted labels of scored emails with the true labels:  python docs/demo/check_scored.py EMAILS SCORED."""

import sys

import pyarrow.parquet as pq
from sklearn.metrics import accuracy_score, confusion_matrix, matthews_corrcoef

emails, scored = (pq.read_table(path) for path in sys.argv[1:3])
truth, found = scored["label"].to_pylist(), scored["predicted_label"].to_pylist()
(ham, false_spam), (missed_spam, spam) = confusion_matrix(truth, found, labels=["ham", "spam"])
print(f"rows in {len(emails)}, rows out {len(scored)}, in error {len(scored) - scored['error'].null_count}")
print(
    f"longest email {max(scored['num_tokens'].to_pylist())} tokens in {max(scored['num_windows'].to_pylist())} windows"
)
print(f"ham right {ham}, ham taken for spam {false_spam}, spam right {spam}, spam missed {missed_spam}")
print(f"accuracy {accuracy_score(truth, found):.3f}, MCC {matthews_corrcoef(truth, found):.3f}")
if len(emails) != len(scored):
    sys.exit("rows were lost")

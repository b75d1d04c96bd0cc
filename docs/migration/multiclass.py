import logging
import sys

import pandas as pd
from simpletransformers.classification import ClassificationArgs, ClassificationModel

logging.basicConfig(level=logging.ERROR)

train_df = pd.DataFrame(
    [
        ["The striker scored twice before the break", "sport"],
        ["Our goalkeeper saved the last penalty", "sport"],
        ["Shares of the bank fell by a tenth", "money"],
        ["Interest on savings will rise again", "money"],
        ["Snow closed the pass for a week", "weather"],
    ]
    * 4,
    columns=["text", "labels"],
)
eval_df = pd.DataFrame(
    [["The team lost at home", "sport"], ["Hail broke the windows", "weather"], ["Taxes fell", "money"]],
    columns=["text", "labels"],
)

model_args = ClassificationArgs(num_train_epochs=6, manual_seed=4, overwrite_output_dir=True, silent=True)
model_args.labels_list = ["money", "sport", "weather"]
model = ClassificationModel("bert", sys.argv[1], num_labels=3, weight=[1.0, 1.0, 2.0], args=model_args, use_cuda=False)
model.train_model(train_df)
result, model_outputs, wrong_predictions = model.eval_model(eval_df)
predictions, raw_outputs = model.predict(["It rained all night", "The referee blew his whistle"])

print("mcc", round(result["mcc"], 3))
print("wrong", [example.guid for example in wrong_predictions])
print("predictions", list(predictions))
print("raw outputs", [[round(float(value), 1) for value in row] for row in raw_outputs])

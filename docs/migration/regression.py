import logging
import sys

import pandas as pd
from simpletransformers.classification import ClassificationArgs, ClassificationModel

logging.basicConfig(level=logging.ERROR)

train_df = pd.DataFrame(
    [
        ["The best meal I have had in years", 5.0],
        ["Lovely place, we will come again", 4.5],
        ["It was fine, nothing special", 3.0],
        ["Slow, cold and far too salty", 1.0],
    ]
    * 4,
    columns=["text", "labels"],
)
eval_df = pd.DataFrame([["A wonderful evening", 5.0], ["Never again", 1.0]], columns=["text", "labels"])

model_args = ClassificationArgs(num_train_epochs=8, manual_seed=4, overwrite_output_dir=True, silent=True)
model_args.regression = True
model_args.learning_rate = 2e-4
model = ClassificationModel("bert", sys.argv[1], num_labels=1, args=model_args, use_cuda=False)
model.train_model(train_df)
result, model_outputs, wrong_predictions = model.eval_model(
    eval_df, mae=lambda truth, predicted: abs(truth - predicted).mean()
)
predictions, raw_outputs = model.predict(["The fish was superb", "The waiter was rude and the soup was cold"])

print("mae", round(float(result["mae"]), 1))
print("predictions", [round(float(value), 1) for value in predictions])

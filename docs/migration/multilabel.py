import logging
import sys

import pandas as pd
from simpletransformers.classification import MultiLabelClassificationArgs, MultiLabelClassificationModel

logging.basicConfig(level=logging.ERROR)

# labels: is about an animal, is about food
train_df = pd.DataFrame(
    [
        ["The cat slept on the roof", [1, 0]],
        ["Two horses crossed the field", [1, 0]],
        ["Pour the sauce over the rice", [0, 1]],
        ["Dinner was bread and olives", [0, 1]],
        ["The dog ate the whole cake", [1, 1]],
        ["The train was late again", [0, 0]],
    ]
    * 4,
    columns=["text", "labels"],
)

model_args = MultiLabelClassificationArgs(num_train_epochs=10, manual_seed=4, overwrite_output_dir=True, silent=True)
model_args.threshold = [0.5, 0.4]
model_args.learning_rate = 2e-4
model = MultiLabelClassificationModel(
    "bert", sys.argv[1], num_labels=2, pos_weight=[1.0, 2.0], args=model_args, use_cuda=False
)
model.train_model(train_df)
predictions, raw_outputs = model.predict(
    ["A cow stood in the rain", "Cut the onion and fry it", "The rabbit likes carrots", "He bought a new chair"]
)

print("predictions", predictions)
print("probabilities", [[round(float(value), 1) for value in row] for row in raw_outputs])

import logging
import sys

import pandas as pd
from simpletransformers.classification import ClassificationArgs, ClassificationModel

logging.basicConfig(level=logging.ERROR)

sea = "The ferry left the harbour and the sailors watched the waves from the deck. "
kitchen = "The cook burned the onions and the soup in the pot needed much more salt. "
train_df = pd.DataFrame(
    [[sea * 6, 1], [kitchen * 6, 0], [sea * 3, 1], [kitchen * 3, 0]] * 2, columns=["text", "labels"]
)

model_args = ClassificationArgs(num_train_epochs=2, manual_seed=4, overwrite_output_dir=True, silent=True)
model_args.sliding_window = True
model_args.max_seq_length = 32
model_args.stride = 0.8
model_args.tie_value = 1
model = ClassificationModel("bert", sys.argv[1], args=model_args, use_cuda=False)
model.train_model(train_df)
predictions, raw_outputs = model.predict([sea * 5 + kitchen, kitchen * 5 + sea, kitchen])

print("predictions", list(predictions))
print("windows", [len(windows) for windows in raw_outputs])

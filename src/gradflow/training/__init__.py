"""The only room with pytorch_lightning: a run's training, and the recorder as its callback."""

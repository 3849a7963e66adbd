"""What is fine-tuned: the three tasks, and how their models are built and adapted."""

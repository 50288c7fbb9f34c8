"""What `ferrotune compare` measures: a fine-tuned model beside what costs no training."""

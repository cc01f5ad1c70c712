"""Fine-tuning: small corrections of a large model, trained, saved, and many served at once."""

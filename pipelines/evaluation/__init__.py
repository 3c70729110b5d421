"""The rooms behind `evaluate`: metrics and reports."""

"""What recorded rows say: tables, sentences and figures, without any store."""

"""results/*.json as Markdown: `rowint8 report`. Measures nothing."""

"""Serving other libraries' models: `gdn_ir.integrations.fla` and `gdn_ir.integrations.transformers`, each with `enable()` and
`disable()`. Only these modules import the libraries, when they are enabled."""

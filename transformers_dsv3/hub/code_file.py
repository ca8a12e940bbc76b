"""The small file that lets `trust_remote_code=True` pick the plugin's classes from a repository.

Transformers would copy the modules of a class into the checkpoint, flattened, without the conversion of expert weights
that is registered beside them. This file imports the installed package instead. Neither Transformers nor anybody else
needs it: without `trust_remote_code=True` it is not read, and a checkpoint saved after loading through it is an
official one again, without code.
"""

CODE_FILE = "transformers_dsv3_classes.py"
AUTO_MAP = {
    auto_class: f"{CODE_FILE.removesuffix('.py')}.{name}"
    for auto_class, name in {
        "AutoConfig": "DeepseekV3Config",
        "AutoModel": "DeepseekV3Model",
        "AutoModelForCausalLM": "DeepseekV3ForCausalLM",
        "AutoModelForSequenceClassification": "DeepseekV3ForSequenceClassification",
        "AutoModelForTokenClassification": "DeepseekV3ForTokenClassification",
    }.items()
}
# In a try block, since Transformers would otherwise report the import as missing before this file can say anything
CODE = '''"""Loads this DeepSeek-V3 checkpoint into the classes of the transformers-dsv3 package."""

try:
    from transformers_dsv3 import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        DeepseekV3ForSequenceClassification,
        DeepseekV3ForTokenClassification,
        DeepseekV3Model,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers_dsv3":
        raise
    raise ImportError(
        "With trust_remote_code=True this model is loaded by the transformers-dsv3 package, which is not installed: "
        "pip install transformers-dsv3. Without trust_remote_code, Transformers loads the model by itself."
    ) from None
'''

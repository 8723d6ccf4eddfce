"""What the example scripts share: arguments, prompts, engines, a warm start. It stands above the whole package.

As `trl.scripts` is for TRL's commands: dataclasses for [`~trl.TrlParser`], and the few lines between them and the
package's classes.
"""

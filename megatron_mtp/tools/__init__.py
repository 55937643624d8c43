"""The old name of several packages. Importing it, or a module below it, says where its modules are now."""

raise ImportError(
    "megatron_mtp.tools is gone. Its modules are now in megatron_mtp.verify, plan, profile, dry_run, drafting, launch, "
    "doctor, data.prepare and examples: tools.demo is examples.demo, tools.decoding is drafting.decoder, "
    "tools.continuations is drafting.continuations, tools.fit_drafter is drafting.fit, and tools.graft_drafter is "
    "drafting.graft."
)

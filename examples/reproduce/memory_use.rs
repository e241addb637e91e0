//! Peak memory of tuning, by what is trained, with and without activations that are computed again.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use burn::module::Module;
use clap::ValueEnum;
use examples::method::MethodName;
use examples::outcome::Result;
use examples::texts::fit_config;
use examples::{memory, println};
use models::Model;
use serde::{Deserialize, Serialize};

use crate::claim::Claim;
use crate::lab::{Lab, unfrozen};
use crate::report::{Section, Table};

/// Steps of each training: the second has the optimizer's state.
const STEPS: usize = 2;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Trained {
    /// All parameters of the dense model
    Full,
    /// LoRA on the dense model
    Lora,
    /// LoRA on normal floats
    Qlora,
    /// The scales of a quantized model
    Peqa,
}

/// The memory of a training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    n_trainable: usize,
    /// Resident memory before the first step.
    before: Option<u64>,
    pub(crate) peak: Option<u64>,
}

/// Why memory is not known.
pub(crate) const UNKNOWN: &str =
    "the memory of a process is known on Linux, for models that compute on the CPU";

/// Bytes in MiB, or a dash.
pub(crate) fn mib(n_bytes: Option<u64>) -> String {
    n_bytes.map_or("-".into(), |n| (n >> 20).to_string())
}

/// Runs the experiment.
pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let mut table = Table::new(&[
        "trained",
        "trainable",
        "before, MiB",
        "peak, MiB",
        "peak with activations again, MiB",
    ]);
    let mut peaks = Vec::new();
    for trained in Trained::value_variants() {
        let plain = trained.cell(lab, false)?;
        let again = trained.cell(lab, true)?;
        table.row([
            trained.title().into(),
            plain.n_trainable.to_string(),
            mib(plain.before),
            mib(plain.peak),
            mib(again.peak),
        ]);
        peaks.push((trained.title(), plain.peak));
    }
    let text = "PEQA is tuned in less memory than LoRA, and LoRA in less than full fine-tuning";
    let source = "Kim et al. 2023, arXiv:2305.14152";
    let claim = match peaks[..] {
        [(_, Some(full)), (_, Some(lora)), _, (_, Some(peqa))] => {
            let evidence = peaks
                .iter()
                .map(|(title, peak)| format!("{title}: {} MiB", mib(*peak)));
            Claim::of(text, source, full > lora && lora > peqa, evidence.collect())
        }
        _ => Claim::not_testable(text, source, UNKNOWN),
    };
    Ok(Section {
        title: "Memory".into(),
        about: format!(
            "Resident memory of a process of its own over {STEPS} steps of {} windows of {} tokens: full fine-tuning in f32, LoRA on the dense model in the floats of its file, QLoRA and PEQA on a base of {} bits; at last with the activations of each block computed again for its gradients.",
            lab.args.batch,
            lab.args.tune_len,
            lab.args.widths()[0],
        ),
        tables: vec![table],
        claims: vec![claim],
        dense: lab.dense()?,
        bars: Vec::new(),
    })
}

impl Trained {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("none is hidden");
        value.get_name().into()
    }

    fn title(self) -> &'static str {
        match self {
            Self::Full => "full fine-tuning",
            Self::Lora => "LoRA",
            Self::Qlora => "QLoRA",
            Self::Peqa => "PEQA",
        }
    }

    /// The cell, which a process of its own measures: what others leave in memory is not counted.
    pub(crate) fn cell(self, lab: &Lab, again: bool) -> Result<Found> {
        let kind = if again { "-again" } else { "" };
        let bits = lab.args.widths()[0];
        let base = match self {
            Self::Full | Self::Lora => lab.source.clone(),
            Self::Qlora => lab.base(MethodName::QLora, bits)?,
            Self::Peqa => lab.base(MethodName::Peqa, bits)?,
        };
        lab.run.cell(&format!("memory-{}{kind}", self.name()), || {
            let mut program = Command::new(env::current_exe()?);
            program.args(env::args_os().skip(1));
            program.args(["--memory-of", &self.name()]);
            program.args(again.then_some("--checkpoint-blocks"));
            program.arg("--memory-base").arg(&base);
            program.arg("--out").arg(lab.run.scratch("memory"));
            let output = program.stderr(Stdio::inherit()).output()?;
            if !output.status.success() {
                return Err(format!("the process that measures memory: {}", output.status).into());
            }
            Ok(serde_json::from_slice(&output.stdout)?)
        })
    }

    /// Measures the training in this process, and prints the result.
    pub(crate) fn print(self, lab: &Lab, again: bool, base: Option<&Path>) -> Result<()> {
        let mut model = lab.load_from(base.unwrap_or(&lab.source))?.model;
        let n_trainable = match self {
            Self::Full => {
                model = unfrozen(model);
                model.num_params()
            }
            Self::Lora | Self::Qlora => attach(lab, MethodName::Lora, &mut model)?,
            Self::Peqa => attach(lab, MethodName::Peqa, &mut model)?,
        };
        let batches = lab.batches(0, STEPS);
        let fit = fit_config(1e-5, STEPS, 0).with_checkpoint_blocks(again);
        memory::reset_peak();
        let before = memory::resident_bytes();
        peft::fit(&mut model, &batches, &fit, |_, _| {})?;
        let is_host = ["flex", "ndarray"].contains(&lab.args.model.device.name.as_str());
        let found = Found {
            n_trainable,
            before: before.filter(|_| is_host),
            peak: memory::peak_bytes().filter(|_| is_host),
        };
        println!("{}", serde_json::to_string(&found)?);
        Ok(())
    }
}

fn attach(lab: &Lab, method: MethodName, model: &mut Model) -> Result<usize> {
    let attached = peft::attach(model, &*lab.adapters(method, 0))?;
    Ok(attached.n_trainable)
}

//! The experiments of the papers on one model, and what they say about the papers' claims.
//!
//! `cargo run --release --example reproduce` does all of them with the embedded model, in some minutes;
//! `-- --help` lists the experiments and the options for other models.

mod chart;
mod claim;
mod deploy;
mod lab;
mod loftq_init;
mod losses;
mod memory_use;
mod merging;
mod peqa;
mod ptq;
mod report;
mod run_dir;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use examples::arguments::{BitsArg, GroupSize, ModelArgs, at_least};
use examples::outcome::{Result, exit};
use examples::{interrupt, println};
use models::Plan;
use peft::PerLayer;
use serde::{Deserialize, Serialize};

use lab::Lab;
use memory_use::Trained;
use report::Section;

/// Repeat the experiments of the papers with one model
///
/// A run is a directory. Experiments are made of cells, such as one model tuned with one seed: finished cells
/// are kept, and the same command goes on after the last one. The report is made from the cells.
#[derive(Parser)]
#[command(
    version,
    args_override_self = true,
    mut_arg("bits", |arg| arg.help(
        "Bits of a weight, one or several of 4, 3 and 2: `peqa` takes Block-AP and `loftq` its base of the least, `merge` of the most [default: 4 3 2]"
    )),
    after_help = "\
Example:
  reproduce ptq peqa --model SmolLM2-135M --train wiki.txt --eval wiki-held-out.txt --drift c4.jsonl \\
            --group-size 64 --seq-len 512 --tune-len 256 --eval-windows 20 --out SmolLM2-135M-run"
)]
struct Args {
    /// Experiments, one or several [default: all]
    #[arg(value_enum)]
    experiments: Vec<Experiment>,
    #[command(flatten)]
    model: ModelArgs,
    /// Text to calibrate and to tune on [default: that of the embedded model]
    #[arg(long, value_name = "FILE", requires = "model")]
    train: Option<PathBuf>,
    /// Held-out text of the same kind
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Text of another kind, to measure what tuning costs there
    #[arg(long, value_name = "FILE", requires = "model")]
    drift: Option<PathBuf>,
    #[command(flatten)]
    bits: BitsArg,
    /// Weights that share a scale, one or several; all but `ptq` take the first
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1.., default_values = ["32"])]
    group_size: Vec<GroupSize>,
    /// Tokens in a window to calibrate and to evaluate on
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least::<32>)]
    seq_len: usize,
    /// Windows to calibrate on
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least::<1>)]
    samples: usize,
    /// Windows of each text to evaluate on, at most
    #[arg(long, value_name = "N", default_value = "20", value_parser = at_least::<2>)]
    eval_windows: usize,
    /// Tokens in a window to tune on
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least::<2>)]
    tune_len: usize,
    /// Windows in a batch to tune on
    #[arg(long, value_name = "N", default_value = "4", value_parser = at_least::<1>)]
    batch: usize,
    /// Optimizer steps of a tuning
    #[arg(long, value_name = "N", default_value = "40", value_parser = at_least::<2>)]
    steps: usize,
    /// Steps at each of four learning rates, by which that of a method is chosen
    #[arg(long, value_name = "N", default_value = "10", value_parser = at_least::<2>)]
    search_steps: usize,
    /// Rank of the adapters
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least::<1>)]
    rank: usize,
    /// Seeds of the adapters and of the order of the windows
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1.., default_values = ["0", "1"])]
    seed: Vec<u64>,
    /// Directory of the run
    #[arg(long, value_name = "DIR", default_value = "reproduce")]
    out: PathBuf,
    /// Measure the memory of one training in this process
    #[arg(long, value_enum, hide = true)]
    memory_of: Option<Trained>,
    #[arg(long, hide = true, requires = "memory_of")]
    checkpoint_blocks: bool,
    #[arg(long, hide = true, requires = "memory_of")]
    memory_base: Option<PathBuf>,
}

/// An experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Experiment {
    /// Quantizers: RTN, clip search, NF, OPTQ, act-order and GPTAQ, at all widths and group sizes
    Ptq,
    /// PEQA beside RTN, OPTQ, LoRA and then OPTQ, QLoRA, full fine-tuning and EfficientQAT
    Peqa,
    /// Initializations: QLoRA, LoftQ, LQ-LoRA, QERA, CLoQ, ApiQ and RILQ
    Loftq,
    /// What is left of each method's adapters when they are merged
    Merge,
    /// Memory of tuning
    Memory,
}

impl Experiment {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("no experiment is hidden");
        value.get_name().into()
    }

    fn run(self, lab: &Lab) -> Result<Section> {
        match self {
            Self::Ptq => ptq::run(lab),
            Self::Peqa => peqa::run(lab),
            Self::Loftq => loftq_init::run(lab),
            Self::Merge => merging::run(lab),
            Self::Memory => memory_use::run(lab),
        }
    }
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let texts = [("--train", &args.train), ("--eval", &args.eval)];
    if args.model.model.is_some()
        && let Some((option, _)) = texts.iter().find(|(_, text)| text.is_none())
    {
        return Err(format!("a model of your own is measured on your texts: add {option}").into());
    }
    let device = args.model.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.model.dir(scratch.path())?;
    let experiments = match &args.experiments[..] {
        [] => Experiment::value_variants(),
        given => given,
    };
    let stored = check(args, experiments, &source, &device)?;
    let lab = Lab::new(args, source, stored, device)?;
    if let Some(trained) = args.memory_of {
        return trained.print(&lab, args.checkpoint_blocks, args.memory_base.as_deref());
    }
    for experiment in experiments {
        let section = experiment.run(&lab)?;
        lab.run.finish(*experiment, &section)?;
    }
    let text = report::write(&lab)?;
    println!("{text}\nreport: {}", args.out.join("report.md").display());
    Ok(())
}

/// Checks before any work that every quantizer and every rank fits the layers of the model.
fn check(args: &Args, experiments: &[Experiment], source: &Path, device: &Device) -> Result<Plan> {
    for bits in args.widths() {
        for &size in &args.group_size {
            for name in ptq::NAMES {
                models::plan(source, &name.quantizer(bits, size))?;
            }
        }
    }
    let (bits, size) = (args.widths()[0], args.group_size());
    let base = models::plan(source, &ptq::Name::Rtn.quantizer(bits, size))?;
    let most = base.layers.iter().flat_map(|layer| layer.dims).min();
    if let Some(most) = most.filter(|most| args.rank > *most) {
        return Err(format!("--rank {}: the least layer has room for {most}", args.rank).into());
    }
    if experiments.contains(&Experiment::Merge) {
        merging::check(&base, device)?;
    }
    Ok(models::plan(source, &PerLayer::default())?)
}

impl Args {
    /// The seeds, each once.
    fn seeds(&self) -> Vec<u64> {
        let mut seeds = self.seed.clone();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    }

    /// The widths, the widest first.
    fn widths(&self) -> Vec<usize> {
        self.bits.or(&[4, 3, 2])
    }

    /// The group size of all experiments but `ptq`.
    fn group_size(&self) -> GroupSize {
        self.group_size[0]
    }
}

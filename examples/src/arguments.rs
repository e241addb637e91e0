//! The options that several programs have.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use crate::device::DeviceArg;
use crate::dtype::DtypeArg;
use crate::embedded::EmbeddedArg;
use crate::outcome::Result;
use crate::texts::fit_config;

/// The model of a program and where it computes.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// Hugging Face directory of the model, or a GGUF file [default: the embedded LLaMA]
    #[arg(long, value_name = "PATH", conflicts_with = "embedded")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    embedded: EmbeddedArg,
    /// The device to compute on.
    #[command(flatten)]
    pub device: DeviceArg,
    /// The type of float to compute in.
    #[command(flatten)]
    pub dtype: DtypeArg,
}

impl ModelArgs {
    /// Returns the directory of the model, which is written below `scratch` if it is an embedded one or in a
    /// GGUF file.
    ///
    /// # Errors
    /// If an embedded model cannot be written, or a file not read.
    pub fn dir(&self, scratch: &Path) -> Result<PathBuf> {
        match &self.model {
            Some(path) if path.is_file() || path.join("model.gguf").is_file() => {
                let dir = scratch.join("from-gguf");
                let mut lm = models::load(path, &self.device.open())?;
                // Its certificate stays with its file.
                lm.certificate = None;
                models::save(&lm, &dir)?;
                Ok(dir)
            }
            Some(dir) => Ok(dir.clone()),
            None => self.embedded.write(scratch),
        }
    }

    /// The name of the model in a report.
    pub fn name(&self) -> String {
        match &self.model {
            Some(dir) => dir.display().to_string(),
            None => self.embedded.name().into(),
        }
    }
}

/// The widths that a program quantizes to. The program says in its help what it does without them.
#[derive(Args, Clone, Debug)]
pub struct BitsArg {
    /// Bits of a weight, one or several, as in `4 3 2` or `4,3,2`: 2, 3, 4, 8
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',')]
    bits: Vec<usize>,
}

impl BitsArg {
    /// Whether a width was given.
    pub fn is_given(&self) -> bool {
        !self.bits.is_empty()
    }

    /// The widths, each once, the widest first; `default` if none is given.
    pub fn or(&self, default: &[usize]) -> Vec<usize> {
        let given = if self.bits.is_empty() {
            default
        } else {
            &self.bits
        };
        let mut bits = given.to_vec();
        bits.sort_unstable_by(|a, b| b.cmp(a));
        bits.dedup();
        bits
    }
}

/// The length of the windows that a text is cut into.
#[derive(Args, Clone, Copy, Debug)]
pub struct SeqLenArg {
    /// Tokens in a window of text, or in a row of packed records
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least::<2>)]
    pub seq_len: usize,
}

/// The number of windows that perplexities are measured on.
#[derive(Args, Clone, Copy, Debug)]
pub struct EvalWindowsArg {
    /// Windows of each text to evaluate on [default: all]
    #[arg(long, value_name = "N", value_parser = at_least::<1>)]
    eval_windows: Option<usize>,
}

impl EvalWindowsArg {
    /// The maximum number of windows.
    pub fn limit(&self) -> usize {
        self.eval_windows.unwrap_or(usize::MAX)
    }
}

/// How adapters of low rank are trained.
#[derive(Args, Clone, Debug)]
pub struct TuneArgs {
    /// Rank of the adapters, for methods that have one
    #[arg(long, value_name = "N", default_value = "4", value_parser = at_least::<1>)]
    pub rank: usize,
    /// LoRA's alpha: the product of the factors is multiplied by alpha / rank [default: the rank]
    #[arg(long, value_name = "X")]
    alpha: Option<f32>,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value = "60")]
    pub steps: usize,
    /// Windows or rows in a batch; each optimizer step takes one batch
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least::<1>)]
    pub batch: usize,
    /// Compute the activations of each block again for its gradients: less memory, for one more forward pass
    #[arg(long)]
    pub checkpoint_blocks: bool,
    /// The length of windows and rows.
    #[command(flatten)]
    pub cut: SeqLenArg,
    /// The windows to evaluate on.
    #[command(flatten)]
    pub eval: EvalWindowsArg,
}

impl TuneArgs {
    /// Checks the settings of the training, at this learning rate if one is given.
    ///
    /// # Errors
    /// If the learning rate or the number of steps is out of its range.
    pub fn check(&self, learning_rate: Option<f64>) -> Result<()> {
        // Default rates are in theirs.
        Ok(fit_config(learning_rate.unwrap_or(1e-3), self.steps, 0).check()?)
    }

    /// Alpha, or the rank if it is not given.
    pub fn alpha(&self) -> f32 {
        self.alpha.unwrap_or(self.rank as f32)
    }
}

/// Parses a count of at least `MIN`.
///
/// # Errors
/// If it is less, or no number.
pub fn at_least<const MIN: usize>(value: &str) -> std::result::Result<usize, String> {
    match value.parse() {
        Ok(n) if n >= MIN => Ok(n),
        _ => Err(format!("expected a number of at least {MIN}")),
    }
}

/// The number of weights that share a scale, or none if all weights of an output do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSize(pub Option<usize>);

impl FromStr for GroupSize {
    type Err = &'static str;

    fn from_str(value: &str) -> std::result::Result<Self, Self::Err> {
        match value.parse() {
            Ok(n) if n > 0 => Ok(Self(Some(n))),
            _ if value == "channel" || value == "-1" => Ok(Self(None)),
            _ => Err("expected a positive number, or `channel` for one scale per output"),
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(n) => n.fmt(f),
            None => "channel".fmt(f),
        }
    }
}

/// Names directories by their paths without the directories that all of them are in.
pub fn distinct_names(dirs: &[PathBuf]) -> Vec<String> {
    let parents = |dir: &PathBuf| dir.components().count().saturating_sub(1);
    let most = dirs.iter().map(parents).min().unwrap_or(0);
    let first = |n: usize| dirs[0].components().take(n).collect::<PathBuf>();
    let is_shared = |&n: &usize| dirs.iter().all(|dir| dir.starts_with(first(n)));
    // One directory alone has nothing to be told apart from.
    let shared = (0..=most).rev().filter(|_| dirs.len() > 1).find(is_shared);
    let name = |dir: &PathBuf| {
        dir.components()
            .skip(shared.unwrap_or(0))
            .collect::<PathBuf>()
    };
    dirs.iter()
        .map(|dir| name(dir).display().to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_sizes_are_read_as_they_are_shown() {
        for text in ["32", "channel"] {
            assert_eq!(text.parse::<GroupSize>().unwrap().to_string(), text);
        }
        assert_eq!("-1".parse(), Ok(GroupSize(None)));
        for text in ["0", "-2", "", "all"] {
            assert!(text.parse::<GroupSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn widths_are_separated_by_commas_or_spaces() {
        #[derive(clap::Parser)]
        struct Program {
            #[command(flatten)]
            bits: BitsArg,
            #[arg(long)]
            seed: usize,
        }
        let bits = |text: &str| {
            let words = format!("program {text} --seed 1");
            let program = <Program as clap::Parser>::try_parse_from(words.split(' ')).ok()?;
            assert_eq!(program.seed, 1);
            Some(program.bits.or(&[3]))
        };
        for text in [
            "--bits 4 3 2",
            "--bits 4,3,2",
            "--bits 2,4 3",
            "--bits 3 --bits 4 --bits 2,3",
        ] {
            assert_eq!(bits(text), Some(vec![4, 3, 2]), "{text}");
        }
        assert_eq!(bits("--bits 8"), Some(vec![8]));
        assert_eq!(
            <Program as clap::Parser>::parse_from(["program", "--seed", "1"])
                .bits
                .or(&[3]),
            [3]
        );
        assert_eq!(bits("--bits"), None);
        assert_eq!(bits("--bits four"), None);
    }

    #[test]
    fn counts_have_a_least_value() {
        assert_eq!(at_least::<2>("2"), Ok(2));
        assert!(at_least::<2>("1").is_err());
        assert!(at_least::<1>("-1").is_err());
    }

    #[test]
    fn names_tell_directories_apart() {
        let names =
            |dirs: &[&str]| distinct_names(&dirs.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(names(&["/models/a/hf"]), ["/models/a/hf"]);
        assert_eq!(names(&["/models/a/hf", "/models/b/hf"]), ["a/hf", "b/hf"]);
        assert_eq!(names(&["a/hf", "b/hf"]), ["a/hf", "b/hf"]);
        assert_eq!(names(&["m/a", "m/a/b"]), ["a", "a/b"]);
        assert_eq!(names(&["hf", "../hf"]), ["hf", "../hf"]);
    }
}

//! Continues a text with a model, word by word.
//!
//! `cargo run --release --example generate -- "Albena"` does so with a model that the project ships;
//! `-- --help` lists what it does with yours.

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::io::{Write, stdout};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use examples::device::DeviceArg;
use examples::embedded::EmbeddedArg;
use examples::tuning::{Result, exit};
use instruct::Chat;
use models::Generation;
use peft::{Adapters, Linears};
use quant_core::Rtn;

/// Continue a text with a LLaMA or an OPT, dense or packed
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  generate \"Albena\" --max-new-tokens 60
  generate --model Llama-2-7b-4bit-task --adapters other-task --temperature 0.8 --top-p 0.95 \"Once\"
  generate --model Llama-2-7b-chat-hf --chat --bits 4 \"What is a quantizer?\""
)]
struct Args {
    /// The text to continue, or the message to answer
    prompt: String,
    /// Hugging Face directory of a model [default: one that comes with the program]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Directory of adapters to put on
    #[arg(long, value_name = "DIR", requires = "model")]
    adapters: Option<PathBuf>,
    /// Answer as the model's chat template has it
    #[arg(long)]
    chat: bool,
    /// Round the weights to so many bits first: 2, 3, 4, 8
    #[arg(long, value_name = "N")]
    bits: Option<usize>,
    /// Weights that share a scale
    #[arg(long, value_name = "N", default_value_t = 32, requires = "bits")]
    group_size: usize,
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_new_tokens: usize,
    /// What logits are divided by; 0 takes the likeliest token each time
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    temperature: f64,
    /// With a temperature: draw from so many of the likeliest tokens [default: all]
    #[arg(long, value_name = "N", requires = "temperature")]
    top_k: Option<usize>,
    /// With a temperature: draw from the likeliest tokens of this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Texts that end the continuation
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let settings = Generation::new(args.max_new_tokens)
        .with_temperature(args.temperature)
        .with_top_k(args.top_k)
        .with_top_p(args.top_p)
        .with_seed(args.seed);
    settings.check()?;
    let device = args.device.open();
    let scratch = tempfile::tempdir()?;
    let source = args.embedded.or(args.model.as_ref(), scratch.path())?;
    let mut lm = models::load(&source, &device)?;
    if let Some(bits) = args.bits {
        let rtn = Rtn::new().with_bits(bits);
        let rtn = rtn.with_group_size(Some(args.group_size));
        models::quantize(&mut lm.model, &rtn, &[], |_| {})?;
    }
    if let Some(adapters) = &args.adapters {
        peft::activate(&mut lm.model, &Adapters::load(adapters, &device)?)?;
    }

    let prompt = match args.chat {
        true => {
            let special = lm.special_tokens()?;
            let chat = Chat::open(&source, &special)?;
            // The template has the special tokens in its text.
            lm.encode(&chat.prompt(&args.prompt)?)?
        }
        false => lm.encode_text(&args.prompt)?,
    };
    let start = Instant::now();
    let mut first = None;
    let mut text = String::new();
    let written = lm.generate(&prompt, &settings, |piece| {
        if first.is_none() && !args.chat {
            print!("{}", args.prompt);
        }
        first.get_or_insert_with(|| start.elapsed());
        text += piece;
        print!("{piece}");
        // What is shown is shown, whoever listens.
        let _ = stdout().flush();
        let mut stops = args.stop.iter().filter(|stop| !stop.is_empty());
        let is_over = stops.any(|stop| text.contains(stop));
        match is_over {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    println!();
    let n_bytes: usize = (lm.model.linears().iter())
        .map(|(_, linear)| linear.weight().n_bytes())
        .sum();
    let n_tokens = written.tokens.len();
    if let Some(first) = first.filter(|_| n_tokens > 1) {
        let rest = (start.elapsed() - first).as_secs_f64();
        eprintln!(
            "\n{} tokens read and the first text written in {:.0} ms; {n_tokens} tokens in all, {:.0} tokens/s; projections of {:.1} MB",
            prompt.len(),
            1e3 * first.as_secs_f64(),
            (n_tokens - 1) as f64 / rest,
            n_bytes as f64 / 1e6,
        );
    }
    Ok(())
}

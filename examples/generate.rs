//! Generates text with a model and prints it as it is generated.
//!
//! `cargo run --release --example generate -- "Albena"` does so with the embedded model; `-- --help`
//! lists the options for other models.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use examples::arguments::{GroupSize, ModelArgs};
use examples::date::DateArg;
use examples::outcome::{Result, exit};
use examples::{eprintln, interrupt, memory, print, println};
use instruct::Chat;
use models::Generation;
use peft::{Adapters, Linears};
use quant_core::Rtn;

/// Generate text with a model, dense or quantized
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  generate \"Albena\" --max-new-tokens 60
  generate --model Llama-2-7b-4bit-task/4-bit --adapters other-task --temperature 0.8 --top-p 0.95 \"Once\"
  generate --model Llama-2-7b-chat-hf --chat --bits 4 \"What is a quantizer?\""
)]
struct Args {
    /// Text to continue, or with --chat a message to answer
    prompt: String,
    #[command(flatten)]
    model: ModelArgs,
    /// Directory of adapters to activate, of this program or of PEFT
    #[arg(long, value_name = "DIR", requires = "model")]
    adapters: Option<PathBuf>,
    /// Answer the prompt, in the chat template of the model
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    date: DateArg,
    /// Quantize the weights to this width first: 2, 3, 4, 8
    #[arg(long, value_name = "N")]
    bits: Option<usize>,
    /// Weights that share a scale: a number, or `channel` for all weights of an output
    #[arg(long, value_name = "N", default_value = "32", requires = "bits")]
    group_size: GroupSize,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_new_tokens: usize,
    /// Temperature of sampling; 0 takes the most probable token each time
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    temperature: f64,
    /// Sample from this many of the most probable tokens [default: all]
    #[arg(long, value_name = "N", requires = "temperature")]
    top_k: Option<usize>,
    /// Sample from the most probable tokens whose probabilities add up to this
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Seed of sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Text that ends the generation; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let settings = Generation::new(args.max_new_tokens)
        .with_temperature(args.temperature)
        .with_top_k(args.top_k)
        .with_top_p(args.top_p)
        .with_seed(args.seed)
        .with_stop_strings(&args.stop);
    settings.check()?;
    let device = args.model.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.model.dir(scratch.path())?;
    let mut lm = models::load_as(&source, &device, args.model.dtype.float())?;
    if let Some(bits) = args.bits {
        let rtn = Rtn::new().with_bits(bits);
        let rtn = rtn.with_group_size(args.group_size.0);
        models::quantize(&mut lm.model, &rtn, &[], |_| {})?;
    }
    if let Some(adapters) = &args.adapters {
        let adapters = Adapters::open_with_base(adapters, &mut lm.model)?;
        peft::activate(&mut lm.model, &adapters)?;
    }

    let prompt = if args.chat {
        let special = lm.special_tokens()?;
        let chat = Chat::open(&source, &special)?.with_now(args.date.or_now());
        // The template writes the special tokens itself.
        lm.encode(&chat.prompt(&args.prompt)?)?
    } else {
        lm.encode_text(&args.prompt)?
    };
    let start = Instant::now();
    let mut first = None;
    let written = lm.generate(&prompt, &settings, |piece| {
        if first.is_none() && !args.chat {
            print!("{}", args.prompt);
        }
        first.get_or_insert_with(|| start.elapsed());
        print!("{piece}");
        ControlFlow::Continue(())
    })?;
    println!();
    let n_bytes: usize = (lm.model.linears().iter())
        .map(|(_, linear)| linear.weight().n_bytes())
        .sum();
    let n_tokens = written.tokens.len();
    if let Some(first) = first.filter(|_| n_tokens > 1) {
        let rest = (start.elapsed() - first).as_secs_f64();
        eprintln!(
            "\nprompt of {} tokens, first text after {:.0} ms; {n_tokens} tokens generated, {:.0} tokens/s; projections of {:.1} MB, peak memory {}",
            prompt.len(),
            1e3 * first.as_secs_f64(),
            (n_tokens - 1) as f64 / rest,
            n_bytes as f64 / 1e6,
            memory::peak(),
        );
    }
    Ok(())
}

//! Trains the embedded models from scratch: a tokenizer, and a LLaMA or an OPT of 1.1 million parameters,
//! on the plain language of `examples::corpus`.
//!
//! `cargo run --release --example pretrain -- --out target/llama` writes the files of
//! `examples/data/llama`, with `--architecture opt` those of `examples/data/opt`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};
use clap::Parser;
use examples::arguments::at_least;
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::embedded::Architecture;
use examples::outcome::{Result, exit};
use examples::texts::fit_config;
use examples::training::Watch;
use examples::{interrupt, println};
use models::{Config, LlamaConfig, Model, OptConfig, Pretrained};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

/// Train an embedded model from scratch
#[derive(Parser)]
#[command(version)]
struct Args {
    /// New directory for the model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Architecture of the model
    #[arg(long, value_enum, default_value_t = Architecture::Llama)]
    architecture: Architecture,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 1500)]
    steps: usize,
    /// Peak learning rate of the cosine schedule [default: by the architecture]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Windows in a batch; each optimizer step takes one batch
    #[arg(long, value_name = "N", default_value = "16", value_parser = at_least::<1>)]
    batch: usize,
    /// Seed of the text, of the initial weights and of the order of the windows
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArg,
}

const VOCAB: usize = 512;
const SEQ_LEN: usize = 128;

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let output = interrupt::reserve(&args.out)?;
    let device = args.device.open();

    let n_tokens = args.steps * args.batch * SEQ_LEN;
    // Four characters for each token: enough that no text is seen twice.
    let text = corpus::text(Dialect::Plain, 4 * n_tokens, args.seed);
    let held_out = corpus::text(Dialect::Plain, 60_000, args.seed + 1);
    let scratch = interrupt::scratch()?;
    let tokenizer = scratch.path().join("tokenizer.json");
    let special = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    });
    tensor_files::write_json(&tokenizer.with_file_name("tokenizer_config.json"), &special)?;
    train_tokenizer(
        &corpus::text(Dialect::Plain, 1_000_000, args.seed),
        &tokenizer,
    )?;

    let model = Model::init(config(args.architecture), args.seed, &device);
    println!("{} parameters", model.num_params());
    let mut lm = Pretrained::new(model, &tokenizer)?;

    let windows = lm.windows(&text, SEQ_LEN)?.take(args.steps * args.batch);
    let learning_rate = args.lr.unwrap_or(learning_rate(args.architecture));
    let fit = fit_config(learning_rate, args.steps, args.seed)
        .with_weight_decay(0.01)
        .with_beta_2(0.95);
    let batches = windows.batches(args.batch, &device);
    let mut watch = Watch::new("pretraining".into(), args.steps, &batches, None)?;
    peft::fit(&mut lm.model, &batches, &fit, |_, training| {
        watch.step(training.steps())
    })?;
    watch.finish("", &[])?;

    let dtype = dtype(args.architecture);
    lm.model = lm.model.map(&mut Round(dtype));
    models::save(&lm, output)?;
    println!("wrote {}", args.out.display());
    let held_out = lm.windows(&held_out, SEQ_LEN)?.batches(16, &device);
    let perplexity = evaluate::perplexity(&lm.model, &held_out)?;
    println!(
        "held-out perplexity {:.3} ({} windows)",
        perplexity.value(),
        perplexity.n_windows
    );
    Ok(())
}

fn config(architecture: Architecture) -> Config {
    match architecture {
        Architecture::Llama => LlamaConfig::default()
            .with_vocab_size(VOCAB)
            .with_hidden_size(128)
            .with_intermediate_size(384)
            .with_num_hidden_layers(4)
            .with_num_attention_heads(4)
            .with_num_key_value_heads(2)
            .with_head_dim(64)
            .with_max_position_embeddings(256)
            .into(),
        Architecture::Opt => OptConfig::default()
            .with_vocab_size(VOCAB)
            .with_hidden_size(128)
            .with_ffn_dim(512)
            .with_num_hidden_layers(5)
            .with_num_attention_heads(4)
            // Embeddings of later positions would not be trained.
            .with_max_position_embeddings(SEQ_LEN)
            .with_word_embed_proj_dim(128)
            .into(),
    }
}

fn learning_rate(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::Llama => 4e-3,
        Architecture::Opt => 2e-3,
    }
}

/// The data type of the published checkpoints of the architecture.
fn dtype(architecture: Architecture) -> DType {
    match architecture {
        Architecture::Llama => DType::BF16,
        Architecture::Opt => DType::F16,
    }
}

/// Trains a byte-level BPE tokenizer and writes it to `path`.
fn train_tokenizer(text: &str, path: &Path) -> Result<()> {
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(|error| error.to_string())?;
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(VOCAB)
        .initial_alphabet(alphabet.into_iter().collect())
        .special_tokens(
            ["<unk>", "<s>", "</s>"]
                .map(|token| AddedToken::from(token, true))
                .into(),
        )
        .build();
    tokenizer
        .train(&mut trainer, text.lines().map(|line| format!("{line}\n")))
        .and_then(|tokenizer| tokenizer.save(path, true))
        .map_err(|error| error.to_string())?;
    Ok(())
}

/// Rounds all parameters to the data type in which they are saved.
struct Round(DType);

impl ModuleMapper for Round {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let device = tensor.device();
            // On the host, for some devices do not compute in 16 bits.
            let data = tensor.into_data().convert_dtype(self.0);
            Tensor::from_data(data.convert_dtype(DType::F32), &device)
        })
    }
}

//! Makes the models that the project ships: a tokenizer, and a LLaMA or an OPT of 1.1 million
//! parameters, trained from scratch on the plain language of `examples::corpus`.
//!
//! `cargo run --release --example pretrain -- --out target/llama` makes the files of
//! `examples/data/llama` again, with `--architecture opt` those of `examples/data/opt`.

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};
use clap::Parser;
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::embedded::Architecture;
use indicatif::{ProgressBar, ProgressStyle};
use models::{Activation, Config, LlamaConfig, Model, OptConfig, Pretrained, RopeScaling, Windows};
use peft::{FitConfig, Schedule};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

/// Trains an embedded model from scratch.
#[derive(Parser)]
struct Args {
    /// The directory to write, which must not exist
    #[arg(long)]
    out: PathBuf,
    /// What to train
    #[arg(long, value_enum, default_value_t = Architecture::Llama)]
    architecture: Architecture,
    /// Optimizer steps
    #[arg(long, default_value_t = 1500)]
    steps: usize,
    /// Learning rate [default: one for the architecture]
    #[arg(long)]
    lr: Option<f64>,
    /// Windows in a step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Seed of the text, of the first weights and of the order of the windows
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArg,
}

const VOCAB: usize = 512;
const SEQ_LEN: usize = 128;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    tensor_files::check_output(&args.out)?;
    let device = args.device.open();

    let n_tokens = args.steps * args.batch * SEQ_LEN;
    // A token is about three characters; the text must not come again before the end.
    let text = corpus::text(Dialect::Plain, 4 * n_tokens, args.seed);
    let held_out = corpus::text(Dialect::Plain, 60_000, args.seed + 1);
    let scratch = tempfile::tempdir()?;
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
    let fit = FitConfig::new()
        .with_learning_rate(args.lr.unwrap_or(learning_rate(args.architecture)))
        .with_steps(Some(args.steps))
        .with_warmup_steps(args.steps / 20)
        .with_schedule(Schedule::Cosine)
        .with_weight_decay(0.01)
        .with_beta_2(0.95)
        .with_seed(args.seed);
    let bar = ProgressBar::new(args.steps as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} steps, {eta} left, {msg}",
    )?);
    peft::fit(
        &mut lm.model,
        &windows.batches(args.batch, &device),
        &fit,
        |step| {
            bar.set_position(step.index as u64);
            bar.set_message(format!("loss {:.4}", step.loss));
        },
    )?;
    bar.finish();

    let dtype = dtype(args.architecture);
    lm.model = lm.model.map(&mut Round(dtype));
    let evaluate =
        |windows: Windows| evaluate::perplexity(&lm.model, &windows.batches(16, &device));
    let perplexity = evaluate(lm.windows(&held_out, SEQ_LEN)?)?;
    println!(
        "held-out perplexity {:.3} ({} windows)",
        perplexity.value(),
        perplexity.n_windows
    );
    models::save(&lm, &args.out)?;
    println!("wrote {}", args.out.display());
    Ok(())
}

fn config(architecture: Architecture) -> Config {
    match architecture {
        Architecture::Llama => Config::Llama(LlamaConfig {
            vocab_size: VOCAB,
            hidden_size: 128,
            intermediate_size: 384,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 64,
            max_position_embeddings: 256,
            sliding_window: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            attention_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
        }),
        Architecture::Opt => Config::Opt(OptConfig {
            vocab_size: VOCAB,
            hidden_size: 128,
            ffn_dim: 512,
            num_hidden_layers: 5,
            num_attention_heads: 4,
            // Places that no window has would stay as they were drawn.
            max_position_embeddings: SEQ_LEN,
            word_embed_proj_dim: 128,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            activation: Activation::Relu,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            tie_word_embeddings: true,
        }),
    }
}

fn learning_rate(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::Llama => 4e-3,
        Architecture::Opt => 2e-3,
    }
}

/// As the published checkpoints have it.
fn dtype(architecture: Architecture) -> DType {
    match architecture {
        Architecture::Llama => DType::BF16,
        Architecture::Opt => DType::F16,
    }
}

/// A byte-level BPE.
fn train_tokenizer(text: &str, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
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

/// Rounds all parameters to the type in which they will be saved.
struct Round(DType);

impl ModuleMapper for Round {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let device = tensor.device();
            // On the host: not every device computes in 16 bits.
            let data = tensor.into_data().convert_dtype(self.0);
            Tensor::from_data(data.convert_dtype(DType::F32), &device)
        })
    }
}

//! The fuzz targets: each gives files made from its input to one of the parsers.
//!
//! What is read is used, saved and read again. A panic, more than 256 MiB of memory, and a model, a
//! certificate or a report that does not survive being saved are findings; an error is not.

#![forbid(unsafe_code)]

use std::alloc::System;
use std::panic::{set_hook, take_hook};
use std::path::Path;
use std::sync::{Arc, Once};

use burn::tensor::{Device, Int, Tensor, TensorData};
use cap::Cap;
use evaluate::Report;
use instruct::{Chat, Record, Template, read_records};
use models::{CheckpointFormat, Config, Model, Pretrained, SpecialTokens, Tokenizer};
use peft::{Adapters, Blocks, CausalLm, Certificate, Fingerprint, Linears, TaskPack, Tasks};
use serde_json::{Map, Value};
use tensor_files::gguf::GgufFile;
use tensor_files::{LazyTensor, TensorFile};

pub mod fixtures;
mod input;

use fixtures::{dense_model, packed_model};
pub use input::{SEPARATOR, tensors_file, tensors_text};
use input::{output, place, write};

/// An allocation beyond the limit fails, which ends the process.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 256 << 20);

const WEIGHTS: &str = "model.safetensors";

/// The files of the target `index`, in the order of its input.
pub const INDEX_FILES: [&str; 4] = [
    "config.json",
    "model.safetensors.index.json",
    "one.safetensors",
    "two.safetensors",
];

/// The files of the targets `exact`, `gptq` and `bitsandbytes`.
pub const CHECKPOINT_FILES: [&str; 4] = [
    "config.json",
    WEIGHTS,
    "quantize_config.json",
    "generation_config.json",
];

/// The files of the targets `adapters` and `peft`.
pub const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The files of the target `tasks`.
pub const TASK_FILES: [&str; 2] = ["task.json", "task.safetensors"];

/// The files of the target `tokenizer`, the last of which is a text to encode.
pub const TOKENIZER_FILES: [&str; 4] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEXT,
];

/// The files of the target `vocabulary`, the last of which is a text to encode.
pub const VOCABULARY_FILES: [&str; 6] = [
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    TEXT,
];

const TEXT: &str = "text";

fn device() -> Device {
    Device::flex()
}

/// The bits of the logits of a few tokens.
fn logits(model: &Model) -> Vec<u32> {
    let most = model.max_positions().unwrap_or(usize::MAX);
    let last = model.config().vocab_size() as i64 - 1;
    let tokens: Vec<i64> = [0, last, last / 2].into_iter().take(most).collect();
    let tokens = TensorData::new(tokens.clone(), [1, tokens.len()]);
    let logits = model.forward(Tensor::<2, Int>::from_data(tokens, &device()));
    bits(logits)
}

fn bits<const D: usize>(values: Tensor<D>) -> Vec<u32> {
    let values = values.into_data().convert::<f32>();
    let values: Vec<f32> = values.try_into_vec().expect("converted to f32");
    values.into_iter().map(f32::to_bits).collect()
}

/// Uses a model that was read, saves it and reads it again.
fn check_model(lm: &Pretrained) {
    for (path, linear) in lm.model.linears() {
        let weight = bits(linear.weight().to_dense()).into_iter();
        assert!(
            weight.map(f32::from_bits).all(f32::is_finite),
            "`{path}` has an infinite weight"
        );
    }
    let before = logits(&lm.model);
    let saved = output();
    models::save(lm, &saved).expect("what was read can be saved");
    let again = models::load(&saved, &device()).expect("what was saved can be read");
    assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&again.model));
    assert_eq!(before, logits(&again.model));
}

/// A safetensors file as it is.
pub fn safetensors(data: &[u8]) {
    let path = place("any.safetensors", data);
    let Ok(mut file) = TensorFile::open(&path) else {
        return;
    };
    for name in file.names() {
        let _ = file.bytes::<1>(&name);
        let _ = file.bytes::<2>(&name);
        let _ = file.words::<1>(&name);
        let _ = file.words::<2>(&name);
        let _ = file.floats::<1>(&name);
        let Ok((values, shape)) = file.floats::<2>(&name) else {
            continue;
        };
        let path = output();
        let tensor = LazyTensor::floats(shape, || values.clone());
        tensor_files::write_tensors(&path, [(name.clone(), tensor)]).expect("a file in memory");
        let mut again = TensorFile::open(&path).expect("what was written can be read");
        let (found, dims) = again.floats::<2>(&name).expect("as it was written");
        assert_eq!(dims, shape);
        assert!(
            values
                .iter()
                .map(|v| v.to_bits())
                .eq(found.iter().map(|v| v.to_bits()))
        );
    }
}

/// A GGUF file of a model.
pub fn gguf(data: &[u8]) {
    let path = place("any.gguf", data);
    let Ok(mut file) = GgufFile::open(&path) else {
        return;
    };
    let shapes: Vec<_> = file
        .names()
        .map(|name| (name.to_owned(), file.shape(name)))
        .collect();
    let shapes: Vec<_> = shapes
        .into_iter()
        .filter_map(|(name, shape)| Some((name, <[usize; 2]>::try_from(shape?).ok()?)))
        .collect();
    for (name, shape) in shapes {
        let _ = file.values(&name, shape);
    }
    let Ok(lm) = models::load(&path, &device()) else {
        return;
    };
    check_model(&lm);
    let saved = output();
    if models::save_as(&lm, &saved, CheckpointFormat::Gguf).is_ok() {
        let again = models::load(&saved, &device()).expect("what was saved can be read");
        assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&again.model));
    }
}

/// An index with two shards.
pub fn index(data: &[u8]) {
    checkpoint_of(&INDEX_FILES, data);
}

/// A directory of a model in any format.
pub fn checkpoint(data: &[u8]) {
    checkpoint_of(&CHECKPOINT_FILES, data);
}

fn checkpoint_of(names: &[&str], data: &[u8]) {
    if let Some(dir) = write(names, data)
        && let Ok(lm) = models::load(dir, &device())
    {
        check_model(&lm);
    }
}

/// A `config.json`.
pub fn config(data: &[u8]) {
    let Ok(json) = serde_json::from_slice::<Map<String, Value>>(data) else {
        return;
    };
    let Ok(config) = Config::from_json(&json, Path::new("config.json")) else {
        return;
    };
    let small = |size: usize| size <= 32;
    // Embeddings of each position, and those of another width.
    let others = match &config {
        Config::Opt(opt) => [opt.max_position_embeddings, opt.word_embed_proj_dim],
        Config::GptNeo(neo) => [neo.max_position_embeddings, 0],
        _ => [0, 0],
    };
    let projections = || config.projections().into_iter().map(|(_, dims)| dims);
    if config.num_hidden_layers() <= 2
        && others.into_iter().all(small)
        && small(config.vocab_size())
        && small(config.hidden_size())
        && projections().flatten().all(small)
    {
        logits(&Model::init(config, 0, &device()));
    }
}

/// Adapters of the models of [`fixtures`], in the format of this workspace.
pub fn adapters(data: &[u8]) {
    let Some(dir) = write(&ADAPTER_FILES, data) else {
        return;
    };
    let Ok(adapters) = Adapters::load(&dir, &device()) else {
        return;
    };
    let saved = output();
    adapters.save(&saved).expect("what was read can be saved");
    let again = Adapters::load(&saved, &device()).expect("what was saved can be read");
    for base in [packed_model(), dense_model()] {
        let of = |adapters: &Adapters| {
            let mut model = base.clone();
            peft::activate(&mut model, adapters).ok()?;
            let logits = logits(&model);
            let merged = peft::merge(&mut model);
            Some((logits, merged.ok().map(|certificate| certificate.merged)))
        };
        assert_eq!(of(&adapters), of(&again));
    }
}

/// A directory of PEFT for the models of [`fixtures`].
pub fn peft(data: &[u8]) {
    let Some(dir) = write(&ADAPTER_FILES, data) else {
        return;
    };
    for mut base in [packed_model(), dense_model()] {
        if Adapters::load(&dir, &device()).is_ok() {
            continue;
        }
        let Ok(adapters) = Adapters::open_with_base(&dir, &mut base) else {
            continue;
        };
        let of = |adapters: &Adapters| {
            let mut model = base.clone();
            peft::activate(&mut model, adapters).expect("they were read for this model");
            logits(&model)
        };
        let before = of(&adapters);
        let saved = output();
        if adapters.save_hf(&saved, &base).is_ok() {
            let again = Adapters::load_hf(&saved, &base).expect("what was saved can be read");
            assert_eq!(before, of(&again));
        }
    }
}

/// A task of the packed model of [`fixtures`].
pub fn tasks(data: &[u8]) {
    let Some(dir) = write(&TASK_FILES, data) else {
        return;
    };
    let Ok(task) = TaskPack::load(&dir) else {
        return;
    };
    let saved = output();
    task.save(&saved).expect("what was read can be saved");
    let again = TaskPack::load(&saved).expect("what was saved can be read");
    assert_eq!(task, again);
    let mut tasks = Tasks::new(packed_model()).expect("it has no adapters");
    if tasks.insert("task", task).is_ok() {
        tasks.activate("task").expect("it was inserted");
        logits(tasks.model());
    }
}

/// Leaves panics of the crate `tokenizers` to the code that makes errors of them.
///
/// libFuzzer's hook ends the process at every panic. One that is not caught ends it still, where it
/// leaves the target.
fn let_tokenizers_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let end = take_hook();
        set_hook(Box::new(move |panic| {
            let file = panic.location().map_or("", |location| location.file());
            // Of a dependency, or of the standard library in its name.
            if !(file.contains("/registry/") || file.starts_with("/rustc/")) {
                end(panic);
            }
        }));
    });
}

/// A tokenizer with its configurations, and a text.
pub fn tokenizer(data: &[u8]) {
    read_tokenizer(&TOKENIZER_FILES, data);
}

/// The vocabularies of a Python tokenizer with its configurations, and a text.
pub fn vocabulary(data: &[u8]) {
    read_tokenizer(&VOCABULARY_FILES, data);
}

fn read_tokenizer(files: &[&str], data: &[u8]) {
    let_tokenizers_panic();
    let Some(dir) = write(files, data) else {
        return;
    };
    let Ok(Some(tokenizer)) = Tokenizer::read(&dir) else {
        return;
    };
    let _ = SpecialTokens::read(&dir, &tokenizer);
    let text = std::fs::read(dir.join(TEXT)).unwrap_or_default();
    if let Ok(tokens) = tokenizer.encode(&String::from_utf8_lossy(&text)) {
        let _ = tokenizer.decode(&tokens);
        if let Ok(mut stream) = tokenizer.stream(&tokens[..tokens.len() / 3]) {
            let _ = tokens
                .iter()
                .try_for_each(|&token| stream.push(token).map(drop));
            let _ = stream.finish();
        }
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX]);
}

/// A chat template and a record, which is rendered by it and as a template of fields.
pub fn template(data: &[u8]) {
    let mut parts = input::parts(data);
    let source = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let fields = serde_json::from_slice(parts.next().unwrap_or_default());
    let record = Record {
        fields: fields.unwrap_or_default(),
        path: Arc::from(Path::new("record")),
        line: 1,
    };
    if let Ok(chat) = Chat::new(&source, &SpecialTokens::default()) {
        let _ = chat.prompt("Hello?");
        let _ = Template::Chat(chat).pieces(&record);
    }
    if let Ok(template) = Template::fields(&source, "{{ answer }}") {
        let _ = template.pieces(&record);
    }
}

/// A file of records.
pub fn records(data: &[u8]) {
    let _ = read_records(&place("records", data));
}

/// The certificate of a merge.
pub fn certificate(data: &[u8]) {
    let Ok(certificate) = serde_json::from_slice::<Certificate>(data) else {
        return;
    };
    let json = serde_json::to_vec(&certificate).expect("it was read from JSON");
    let again: Certificate = serde_json::from_slice(&json).expect("what was written can be read");
    // Not the certificates: a number that is not finite differs from itself.
    let json_again = serde_json::to_vec(&again).expect("it was read from JSON");
    assert_eq!(json, json_again);
    let _ = certificate.to_string();
    let model = packed_model();
    let differences = certificate.merged.differences(&Fingerprint::of(&model));
    assert!(certificate.verify(&model).is_err() || differences.is_empty());
}

/// A report of an evaluation.
pub fn report(data: &[u8]) {
    let Ok(report) = Report::from_json(&String::from_utf8_lossy(data)) else {
        return;
    };
    let _ = (report.to_markdown(), report.to_svg());
    let json = report.to_json();
    let again = Report::from_json(&json).expect("what was written can be read");
    assert_eq!(again.to_json(), json);
}

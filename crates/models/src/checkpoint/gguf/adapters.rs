//! Adapters as llama.cpp reads them beside a model: its `--lora` files.

use peft::Linears;
use serde_json::Value as Json;
use tensor_files::IntoOutput;
use tensor_files::gguf::{BlockType, GgufTensor, Value, write_gguf};

use super::names::{self, Architecture, inverse, reordered};
use crate::checkpoint::packing::transpose;
use crate::checkpoint::parameters::read;
use crate::source::weight_name;
use crate::{CheckpointError, ConfigError, Pretrained, Result};

/// The file of adapters in a directory.
const FILE: &str = "adapter.gguf";

/// Saves the adapters of a model in a new directory as `adapter.gguf`, which llama.cpp reads beside the model
/// with `--lora`.
///
/// llama.cpp adds products of two factors, `α / r · x A B`, with one `α` for all layers. The factors are `f32`,
/// and those of queries and keys have the order of rows of llama.cpp's files. A layer with another `α` than the
/// first one has its own in `B`. The base is not written: see [`save_gguf`](crate::save_gguf).
///
/// # Errors
/// [`CheckpointError::GgufAdapters`] with the layers whose adapters are no such product;
/// [`peft::Error::NoAdapters`]; [`ConfigError::Setting`] for architectures that the format does not hold; otherwise as
/// [`save`](crate::save).
///
/// # Examples
/// ```no_run
/// use peft::{Adapters, Lora};
///
/// let mut lm = models::load("SmolLM2-135M-Instruct", &burn::tensor::Device::flex())?;
/// peft::attach(&mut lm.model, &Lora::new(16))?;
/// models::save_gguf_adapters(&lm, "adapters-gguf")?;
/// // llama-cli -m SmolLM2-135M-Instruct-gguf/model.gguf --lora adapters-gguf/adapter.gguf
/// # Ok::<(), models::Error>(())
/// ```
pub fn save_gguf_adapters(lm: &Pretrained, dir: impl IntoOutput) -> Result<()> {
    let model_type = lm.config.get("model_type").and_then(Json::as_str);
    let model_type = model_type.unwrap_or_default();
    let (Some(architecture), Some(shape)) = (
        Architecture::of_model_type(model_type),
        names::shape(lm.model.config()),
    ) else {
        let problem = format!("is `{model_type}`; GGUF is written for llama, mistral, qwen2");
        let path = lm.dir.join("config.json");
        return Err(ConfigError::setting(&path, "model_type", problem).into());
    };
    let (mut products, mut refused) = (Vec::new(), Vec::new());
    for (path, linear) in lm.model.linears() {
        let Some(adapter) = linear.adapter() else {
            continue;
        };
        match adapter.low_rank() {
            Some(product) => products.push((path, product)),
            None => refused.push((path, format!("its adapter is {}", adapter.method()))),
        }
    }
    if !refused.is_empty() {
        return Err(CheckpointError::GgufAdapters { layers: refused }.into());
    }
    let Some((_, first)) = products.first() else {
        return Err(peft::Error::NoAdapters.into());
    };
    let alpha_of = |product: &peft::LowRank| product.scale * product.a.dims()[1] as f32;
    let alpha = alpha_of(first);
    let string = |value: &str| Value::String(value.into());
    let metadata = [
        ("general.architecture".into(), string(architecture.name())),
        ("general.type".into(), string("adapter")),
        ("adapter.type".into(), string("lora")),
        ("adapter.lora.alpha".into(), Value::F32(alpha)),
    ];
    let tensors = products.iter().flat_map(|(path, product)| {
        let name = weight_name(path);
        let in_file = names::row_order(architecture, shape, &name).map(|rows| inverse(&rows));
        let name = names::tensor(&name).unwrap_or(name);
        let ([d_in, rank], [_, d_out]) = (product.a.dims(), product.b.dims());
        let own = alpha_of(product) / alpha;
        let a = GgufTensor::new(BlockType::F32, [rank, d_in], move || {
            let values = transpose(&read(product.a.clone()), [d_in, rank]);
            BlockType::F32.floats(&values).expect("a type of float")
        });
        let b = GgufTensor::new(BlockType::F32, [d_out, rank], move || {
            let mut values = transpose(&read(product.b.clone()), [rank, d_out]);
            if let Some(order) = in_file {
                values = reordered(&values, rank, &order);
            }
            if own != 1.0 {
                values.iter_mut().for_each(|value| *value *= own);
            }
            BlockType::F32.floats(&values).expect("a type of float")
        });
        [(format!("{name}.lora_a"), a), (format!("{name}.lora_b"), b)]
    });
    let tensors: Vec<_> = tensors.collect();
    tensor_files::write_directory(dir, |dir| {
        Ok(write_gguf(&dir.join(FILE), &metadata, tensors)?)
    })
}

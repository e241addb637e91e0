//! bitsandbytes' checkpoints of 4 bits, NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314).
//!
//! A weight is flattened row by row over `[d_out, d_in]` and cut into blocks of `blocksize`, each
//! with a scale, its `absmax`.
//!
//! | tensor | type, shape | |
//! |---|---|---|
//! | `PATH.weight` | `U8 [n / 2, 1]`, rounded up | codes, the first of two in the high half; or these bytes as numbers of another type (`bnb_4bit_quant_storage`) |
//! | `PATH.weight.absmax` | `F32 [n_blocks]` | or `U8`, where they are double-quantized |
//! | `PATH.weight.quant_map` | `F32 [16]` | the levels |
//! | `PATH.weight.nested_absmax` | `F32` | one for each `nested_blocksize` codes of scales |
//! | `PATH.weight.nested_quant_map` | `F32 [256]` | the levels of scales |
//! | `PATH.weight.quant_state.bitsandbytes__nf4` | `U8` | JSON: shape, sizes of blocks, offset |
//!
//! Blocks may straddle rows. Such a layer has groups of the greatest common divisor of a row and a
//! block: none crosses the end of a row or of a block, so that all of a group is in one block, whose
//! scale it takes.

use std::path::Path;

use burn::tensor::Device;
use quant_core::{
    DoubleQuant, DoubleScales, Format, Grid, Layout, Parts, QuantTensor, ScaleLevels, Scales,
    scale_levels,
};
use serde_json::{Map, Value, json};
use tensor_files::{FloatType, LazyTensor};

use super::format::{LayerFormat, Layers, PackedLayer, Refusals, double_scales, quant_error};
use super::packing::{pack, transpose};
use super::parameters::read;
use super::tensors::{Stored, Tensors};
use crate::Result;
use crate::settings::Settings;
use crate::source::HEAD;

mod state;

use state::{State, gcd};

pub(super) const METHOD: &str = "bitsandbytes";

const TYPES: [(&str, Grid); 2] = [("nf4", Grid::NormalFloat), ("fp4", Grid::Float4)];
/// The types of tensors that may hold codes, as configurations name them and as safetensors does.
const STORAGE: [(&str, &str); 5] = [
    ("uint8", "U8"),
    ("int8", "I8"),
    ("float16", "F16"),
    ("bfloat16", "BF16"),
    ("float32", "F32"),
];
/// The number of scales that share a nested `absmax`. The kernels of bitsandbytes support no other.
const NESTED_BLOCK: usize = 256;
const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

pub(super) struct Bitsandbytes {
    quant_type: &'static str,
    is_double: bool,
    dtype: String,
    /// The dtype of the tensors of codes in safetensors, if it is stated.
    storage: Option<&'static str>,
    /// The modules that readers must leave dense, if they would not by themselves.
    dense: Option<Vec<String>>,
}

impl Bitsandbytes {
    pub(super) fn open(json: &Value, config: &Path) -> Result<Self> {
        let settings = Settings::within(json, config, "quantization_config")?;
        if is_set(&settings, "load_in_8bit")? {
            let problem = "is true; of bitsandbytes' formats, those of 4 bits are read";
            return Err(settings.refuse("load_in_8bit", problem));
        }
        if !is_set(&settings, "load_in_4bit")? {
            let problem = "is not true; of bitsandbytes' formats, those of 4 bits are read";
            return Err(settings.refuse("load_in_4bit", problem));
        }
        let storage = match settings.optional_text("bnb_4bit_quant_storage")? {
            None => None,
            Some(name) => {
                let name = name.strip_prefix("torch.").unwrap_or(name);
                let known = STORAGE.iter().find(|(known, _)| *known == name);
                let Some((_, dtype)) = known else {
                    let supported = STORAGE.map(|(known, _)| known).join(", ");
                    let problem = format!("is `{name}`; supported: {supported}");
                    return Err(settings.refuse("bnb_4bit_quant_storage", problem));
                };
                Some(*dtype)
            }
        };
        // Each layer states the rest.
        Ok(Self {
            quant_type: TYPES[0].0,
            is_double: false,
            dtype: String::new(),
            storage,
            dense: None,
        })
    }

    /// The format of layers that [`refusals`] does not list.
    pub(super) fn for_layers(layers: &Layers, config: &Map<String, Value>) -> Self {
        // The type in which a reader computes, on which scales and codes do not depend.
        let dtype = config.get("dtype").or(config.get("torch_dtype"));
        let dtype = dtype.and_then(Value::as_str);
        let dtype = dtype.filter(|dtype| ["float16", "bfloat16"].contains(dtype));
        let packed = layers.packed.iter().chain(&layers.head);
        let mut formats = packed.map(|layer| layer.format);
        let first = formats.clone().find_map(|format| type_of(format).ok());
        // Readers leave the head dense unless they are told which modules are.
        let head = layers.head.is_none().then(|| HEAD.to_string());
        let is_told = !layers.dense.is_empty() || head.is_none();
        Self {
            quant_type: first.unwrap_or(TYPES[0].0),
            is_double: formats.any(|format| format.double_quant().is_some()),
            dtype: dtype.unwrap_or("float32").into(),
            storage: None,
            dense: is_told.then(|| layers.dense.iter().cloned().chain(head).collect()),
        }
    }

    /// Checks the tensor of the `n` codes of a layer, two to a byte, whose dtype may be another one.
    fn check_codes(&self, stored: &Stored, n: usize) -> Result<(), String> {
        let found = stored.dtype.as_str();
        let size = match found {
            "U8" | "I8" => 1,
            "F16" | "BF16" => 2,
            "F32" => 4,
            _ => {
                return Err(format!(
                    "is {found}, not U8, or BF16, F16 or F32 with the bytes in it"
                ));
            }
        };
        if let Some(expected) = self.storage.filter(|&expected| expected != found) {
            return Err(format!(
                "is {found}, but `bnb_4bit_quant_storage` is that of {expected}: numbers were converted that stand for bytes, or the configuration is of another model"
            ));
        }
        let expected = [n.div_ceil(2) / size, 1];
        if stored.shape == expected && stored.bytes.len() == n.div_ceil(2) {
            return Ok(());
        }
        let shape = stored.shape;
        Err(format!(
            "has the shape {shape:?}, the configuration asks for {expected:?}"
        ))
    }
}

/// Whether a configuration states that weights are packed, under either of two names.
pub(super) fn is_stated(settings: &Settings) -> Result<bool> {
    Ok(is_set(settings, "load_in_4bit")? || is_set(settings, "load_in_8bit")?)
}

fn is_set(settings: &Settings, key: &str) -> Result<bool> {
    let older = format!("_{key}");
    Ok(settings.optional_flag(key)? == Some(true) || settings.optional_flag(&older)? == Some(true))
}

/// The layers whose formats bitsandbytes cannot hold, whatever their values.
pub(super) fn refusals<'a>(layers: impl Iterator<Item = &'a PackedLayer>) -> Refusals {
    let mut common = None;
    let refusals = layers.filter_map(|layer| {
        let reason = reason_against_format(layer, &mut common)?;
        Some((layer.path.clone(), reason))
    });
    refusals.collect()
}

/// The reason why bitsandbytes cannot hold weights of a layer's format. `common` is the first layer that
/// has one of the types, with its type.
fn reason_against_format<'a>(
    layer: &'a PackedLayer,
    common: &mut Option<(&'a str, &'static str)>,
) -> Option<String> {
    let quant_type = match type_of(layer.format) {
        Ok(quant_type) => quant_type,
        Err(reason) => return Some(reason),
    };
    let (first, of_first) = *common.get_or_insert((&layer.path, quant_type));
    if quant_type != of_first {
        return Some(format!(
            "is {quant_type}, `{first}` is {of_first}, and there is one type for all"
        ));
    }
    block_sizes(layer.format, layer.dims[0]).err()
}

/// The reason why bitsandbytes cannot hold the values of a weight; none for one that is refused for its
/// format.
pub(super) fn reason_against_values(weight: &QuantTensor) -> Option<String> {
    let sizes = block_sizes(weight.format(), weight.dims()[0]).ok()?;
    block_size(weight, sizes).err()
}

fn type_of(format: Format) -> Result<&'static str, String> {
    let found = TYPES.iter().find(|(_, grid)| *grid == format.grid());
    match found {
        Some((name, _)) if format.bits() == 4 => Ok(name),
        _ => Err(format!(
            "is {format}, and bitsandbytes' types are NF4 and FP4"
        )),
    }
}

/// The sizes of blocks that may hold weights of a format, the largest first, or the reason why there are
/// none.
///
/// A file of blocks of `b` reads back with groups of `gcd(d_in, b)`, so that `b` must give the
/// weight's group size.
fn block_sizes(format: Format, d_in: usize) -> Result<Vec<usize>, String> {
    let Some(group_size) = format.group_size() else {
        return Err("has one group per channel; blocks have 32 to 4096 elements".into());
    };
    let fits = |block: &usize| gcd(d_in, *block) == group_size;
    let Some(double) = format.double_quant() else {
        let sizes: Vec<usize> = BLOCKS.into_iter().rev().filter(fits).collect();
        return match sizes[..] {
            [] => Err(no_blocks(group_size, d_in)),
            _ => Ok(sizes),
        };
    };
    if double.levels != ScaleLevels::Dynamic {
        return Err(format!(
            "is {format}, and bitsandbytes' scales are of its dynamic map"
        ));
    }
    let block = |double: DoubleQuant| {
        let repeated = double.block_size.checked_div(NESTED_BLOCK)?;
        let block = repeated.checked_mul(group_size)?;
        let holds = double.block_size.is_multiple_of(NESTED_BLOCK)
            && BLOCKS.contains(&block)
            && fits(&block);
        holds.then_some(vec![block])
    };
    block(double).ok_or_else(|| no_nested_blocks(format))
}

/// The largest of some sizes of blocks that holds a weight exactly, or the reason why there is none.
///
/// All groups of a block must have one scale. The largest such size is the one that a layer read from
/// a file had: its blocks differ in their scales, or all choices give the same scales.
fn block_size(weight: &QuantTensor, sizes: Vec<usize>) -> Result<usize, String> {
    if weight.input_order().is_some() {
        return Err("takes its inputs in another order, which blocks cannot".into());
    }
    let (format, layout) = (weight.format(), weight.layout());
    let group_size = layout.group_size();
    let mut sizes = sizes.into_iter();
    if format.double_quant().is_some() {
        let codes = double_scales(weight).codes();
        let size = sizes.find(|size| is_constant(&codes, size / group_size));
        return size.ok_or_else(|| no_nested_blocks(format));
    }
    let scales = transpose(&read(weight.scales()), layout.grid_shape());
    let scales: Vec<u32> = scales.into_iter().map(f32::to_bits).collect();
    let size = sizes.find(|size| is_constant(&scales, size / group_size));
    size.ok_or_else(|| no_blocks(group_size, layout.d_in()))
}

fn no_blocks(group_size: usize, d_in: usize) -> String {
    format!(
        "has groups of {group_size} among {d_in} inputs, which are no blocks of 32, 64, .. 4096"
    )
}

fn no_nested_blocks(format: Format) -> String {
    format!(
        "is {format}, which is no block of 32, 64, .. 4096 with {NESTED_BLOCK} scales to a block"
    )
}

/// Whether each `n` values are the same one.
fn is_constant<T: PartialEq>(values: &[T], n: usize) -> bool {
    let mut blocks = values.chunks(n);
    blocks.all(|block| block.iter().all(|value| *value == block[0]))
}

fn levels(layout: &Layout) -> Vec<f32> {
    (0..16).map(|code| layout.level(code)).collect()
}

/// Checks that a table is the one of this program, up to the rounding of the processor that computed
/// it.
fn check_levels(tensors: &mut Tensors, name: &str, expected: &[f32]) -> Result<()> {
    let found = tensors.floats(name, [expected.len()])?;
    let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 4.0 * f32::EPSILON * b.abs();
    let Some(at) = found.iter().zip(expected).position(|pair| !same(pair)) else {
        return Ok(());
    };
    let (found, expected) = (found[at], expected[at]);
    let problem = format!("level {at} is {found}; that of bitsandbytes is {expected}");
    Err(tensors.refuse(name, problem))
}

/// See [`LayerFormat::packed_tensor`], which needs no configuration in this format.
pub(super) fn packed_tensor(tensors: &Tensors, path: &str) -> Option<String> {
    let names = TYPES.map(|(name, _)| state_name(path, name));
    names.into_iter().find(|name| tensors.contains(name))
}

impl LayerFormat for Bitsandbytes {
    fn packed_tensor(&self, tensors: &Tensors, path: &str) -> Option<String> {
        packed_tensor(tensors, path)
    }

    fn format(
        &self,
        tensors: &mut Tensors,
        path: &str,
        dims: [usize; 2],
    ) -> Result<Option<Format>> {
        let Some(state_name) = self.packed_tensor(tensors, path) else {
            return Ok(None);
        };
        let state = State::read(tensors, &state_name, dims)?;
        state.format(path, dims[0]).map(Some)
    }

    fn read(
        &self,
        tensors: &mut Tensors,
        path: &str,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Option<QuantTensor>> {
        let Some(state_name) = self.packed_tensor(tensors, path) else {
            return Ok(None);
        };
        let quant = quant_error(path);
        let [d_in, d_out] = dims;
        let name = |part: &str| format!("{path}.weight{part}");
        let state = State::read(tensors, &state_name, dims)?;
        let format = state.format(path, d_in)?;
        let repeated = state.repeated(d_in);
        let layout = format.layout(dims).map_err(&quant)?;
        check_levels(tensors, &name(".quant_map"), &levels(&layout))?;

        let n = d_in * d_out;
        let stored = tensors.stored(&name(""))?;
        let checked = self.check_codes(&stored, n);
        checked.map_err(|problem| tensors.refuse(&name(""), problem))?;
        let bytes = stored.bytes;
        let codes = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let codes: Vec<u8> = codes.take(n).collect();
        let columns = pack(&transpose(&codes, [d_out, d_in]), d_out, 4);

        let n_blocks = n.div_ceil(state.blocksize);
        let n_groups = layout.n_groups();
        // Group `k` of the flattened weight is in block `k / repeated`.
        let blocks = (0..d_out * n_groups).map(|group| group / repeated);
        let absmax = name(".absmax");
        let scales = match state.nested {
            None => {
                let absmax = tensors.floats(&absmax, [n_blocks])?;
                let scales: Vec<f32> = blocks.map(|block| absmax[block]).collect();
                Scales::Float(transpose(&scales, [d_out, n_groups]))
            }
            Some((nested_block, offset)) => {
                let map = scale_levels(ScaleLevels::Dynamic);
                check_levels(tensors, &name(".nested_quant_map"), &map)?;
                let codes = tensors.bytes(&absmax, [n_blocks])?;
                let n_absmax = n_blocks.div_ceil(nested_block);
                Scales::Double(DoubleScales {
                    codes: blocks.map(|block| codes[block]).collect(),
                    absmax: tensors.floats(&name(".nested_absmax"), [n_absmax])?,
                    offset: offset as f32,
                })
            }
        };
        let words = Parts::from_columns(&columns, &layout, Vec::new(), None).map_err(&quant)?;
        let parts = Parts { scales, ..words };
        let weight = QuantTensor::from_parts(parts, format, dims, device);
        Ok(Some(weight.map_err(quant)?))
    }

    fn tensors<'a>(&self, path: &str, weight: &'a QuantTensor) -> Vec<(String, LazyTensor<'a>)> {
        let name = |part: &str| format!("{path}.weight{part}");
        let sizes = block_sizes(weight.format(), weight.dims()[0]);
        let block = sizes.and_then(|sizes| block_size(weight, sizes));
        let block = block.expect("a weight that the format holds");
        let ([d_in, d_out], layout) = (weight.dims(), weight.layout());
        let n = d_in * d_out;
        let n_blocks = n.div_ceil(block);
        let repeated = block / layout.group_size();
        let packed = move || {
            let mut codes = transpose(&weight.codes(), [d_in, d_out]);
            if !n.is_multiple_of(2) {
                // bitsandbytes quantizes a zero there.
                let is_zero = |&code: &u8| layout.level(code) == 0.0;
                codes.push((0..16).find(is_zero).expect("the types have a zero"));
            }
            let (pairs, _) = codes.as_chunks::<2>();
            pairs
                .iter()
                .map(|[first, second]| first << 4 | second)
                .collect()
        };
        let map = levels(&layout);
        let mut all = vec![
            (name(""), LazyTensor::bytes([n.div_ceil(2), 1], packed)),
            (
                name(".quant_map"),
                LazyTensor::floats_as(FloatType::F32, [16], move || map.clone()),
            ),
        ];
        let mut state = format!(
            r#"{{"quant_type": "{}", "blocksize": {block}, "dtype": "{}", "shape": [{d_out}, {d_in}]"#,
            self.quant_type, self.dtype
        );
        match weight.format().double_quant() {
            None => {
                let absmax = move || {
                    let grid = layout.grid_shape();
                    let scales = transpose(&read(weight.scales()), grid);
                    scales.into_iter().step_by(repeated).collect()
                };
                all.push((
                    name(".absmax"),
                    LazyTensor::floats_as(FloatType::F32, [n_blocks], absmax),
                ));
            }
            Some(double) => {
                let codes = move || {
                    let codes = double_scales(weight).codes().into_iter();
                    codes.step_by(repeated).collect()
                };
                let nested = [n_blocks.div_ceil(NESTED_BLOCK)];
                let map = scale_levels(double.levels);
                all.push((name(".absmax"), LazyTensor::bytes([n_blocks], codes)));
                all.push((
                    name(".nested_absmax"),
                    LazyTensor::floats_as(FloatType::F32, nested, || {
                        double_scales(weight).absmax()
                    }),
                ));
                all.push((
                    name(".nested_quant_map"),
                    LazyTensor::floats_as(FloatType::F32, [map.len()], move || map.clone()),
                ));
                let offset = python_float(double_scales(weight).offset().into());
                state += &format!(
                    r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}"#
                );
            }
        }
        state.push('}');
        let state_name = state_name(path, self.quant_type);
        let state = LazyTensor::bytes([state.len()], move || state.clone().into_bytes());
        all.push((state_name, state));
        all
    }

    fn config(&self) -> Value {
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.is_double,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": self.dense,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": METHOD,
        })
    }
}

fn state_name(path: &str, quant_type: &str) -> String {
    format!("{path}.weight.quant_state.bitsandbytes__{quant_type}")
}

/// A finite number as Python's `json` writes it: with the fewest digits that read back the same.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("asked for an exponent");
    let exponent: i32 = exponent.parse().expect("a whole number");
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_pythons() {
        for (value, text) in [
            (0.20712479948997498, "0.20712479948997498"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (2.0, "2.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-17, "1.25e-17"),
            (1e16, "1e+16"),
            (123456789012345.0, "123456789012345.0"),
            (1.5e300, "1.5e+300"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }
}

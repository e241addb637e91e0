//! The settings of a layer, `quant_state`.

use quant_core::{DoubleQuant, Format, Grid, ScaleLevels};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{BLOCKS, TYPES};
use crate::Result;
use crate::checkpoint::format::quant_error;
use crate::checkpoint::tensors::Tensors;

/// `quant_state`, without the tensors.
struct StateFields {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl StateFields {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let json: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| format!("cannot be read: {error}"))?;
        Ok(Self {
            quant_type: field(&json, "quant_type")?,
            blocksize: field(&json, "blocksize")?,
            shape: field(&json, "shape")?,
            nested_blocksize: field(&json, "nested_blocksize")?,
            nested_dtype: field(&json, "nested_dtype")?,
            nested_offset: field(&json, "nested_offset")?,
        })
    }
}

fn field<T: DeserializeOwned>(json: &Map<String, Value>, key: &str) -> Result<T, String> {
    let value = json.get(key).unwrap_or(&Value::Null);
    let read = serde_json::from_value(value.clone());
    read.map_err(|_| format!("has the {key} {value}, which cannot be read"))
}

/// The settings of a layer.
pub(super) struct State {
    pub(super) grid: Grid,
    pub(super) blocksize: usize,
    /// The size of the blocks of double-quantized scales, and their offset.
    pub(super) nested: Option<(usize, f64)>,
}

impl State {
    /// Reads the settings of a layer, `[d_in, d_out]`, from the tensor that has them.
    pub(super) fn read(
        tensors: &mut Tensors,
        name: &str,
        [d_in, d_out]: [usize; 2],
    ) -> Result<Self> {
        let text = tensors.text(name)?;
        let state = StateFields::parse(&text).and_then(|fields| {
            let type_of_name = |quant_type: &str| name.ends_with(&format!("__{quant_type}"));
            let known = TYPES
                .into_iter()
                .find(|(known, _)| *known == fields.quant_type);
            let Some((_, grid)) = known.filter(|(known, _)| type_of_name(known)) else {
                return Err(format!("has the quant_type `{}`", fields.quant_type));
            };
            let blocksize = fields.blocksize;
            if !BLOCKS.contains(&blocksize) {
                return Err(format!(
                    "has the blocksize {blocksize}; it must be 32, 64, .. 4096"
                ));
            }
            if fields.shape != [d_out, d_in] {
                let (found, expected) = (&fields.shape, [d_out, d_in]);
                return Err(format!(
                    "has the shape {found:?}, the configuration asks for {expected:?}"
                ));
            }
            let nested = match (fields.nested_blocksize, fields.nested_offset) {
                (None, None) => None,
                (Some(size), Some(offset)) => Some((size, offset)),
                _ => return Err("has one of nested_blocksize and nested_offset alone".into()),
            };
            if let Some((size, _)) = nested
                && (size == 0 || size.checked_mul(blocksize).is_none())
            {
                return Err(format!("has the nested_blocksize {size}"));
            }
            let dtype = fields.nested_dtype.as_deref();
            if let Some(dtype) = dtype.filter(|&dtype| dtype != "float32") {
                return Err(format!(
                    "has the nested_dtype `{dtype}`; supported: float32"
                ));
            }
            Ok(Self {
                grid,
                blocksize,
                nested,
            })
        });
        state.map_err(|problem| tensors.refuse(name, problem))
    }

    /// The groups of a weight of `d_in` inputs that are in one block.
    pub(super) fn repeated(&self, d_in: usize) -> usize {
        self.blocksize / gcd(d_in, self.blocksize)
    }

    /// The format of the weight of the layer at `path`.
    pub(super) fn format(&self, path: &str, d_in: usize) -> Result<Format> {
        let group_size = gcd(d_in, self.blocksize);
        let format = Format::new(4, Some(group_size), self.grid);
        let format = format.and_then(|format| match self.nested {
            None => Ok(format),
            Some((nested_block, _)) => format.with_double_quant(DoubleQuant {
                levels: ScaleLevels::Dynamic,
                block_size: nested_block * self.repeated(d_in),
            }),
        });
        format.map_err(quant_error(path))
    }
}

/// The greatest common divisor.
pub(super) fn gcd(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => gcd(b, a % b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_are_the_greatest() {
        assert_eq!([gcd(160, 64), gcd(64, 4096), gcd(7, 64)], [32, 64, 1]);
    }
}

//! Values as codes of 8 bits with one factor for each block, on their device.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::values::{check_finite, check_length, floats, words};
use crate::{Result, codebook};

/// The levels between 0 and 1, or -1 and 1, that codes of 8 bits stand for.
///
/// They are denser towards zero: seven decades have twice as many levels each as the one below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynamicMap {
    /// Both signs, and 0.
    Signed,
    /// Positive levels of 10⁻⁷ and above: nothing but a block of zeros becomes 0.
    Unsigned,
}

impl DynamicMap {
    fn levels(self) -> [f32; 256] {
        match self {
            Self::Signed => codebook::dynamic_map(),
            Self::Unsigned => codebook::unsigned_dynamic_map(),
        }
    }
}

/// Values in blocks of 256: `v = level(code) · absmax`, with the nearest level (Dettmers et al. 2022,
/// arXiv:2110.02861, §2).
///
/// They take 8 bits each and 32 for each block, which the states of an optimizer need no more than.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{BlockCodes, DynamicMap};
///
/// let values = Tensor::<1>::from_floats([0.5, -2.0, 1e-3, 0.0], &Device::flex());
/// let codes = BlockCodes::quantize(values, DynamicMap::Signed);
/// let again = codes.dequantize().into_data().try_into_vec::<f32>()?;
/// assert_eq!((again[1], again[3]), (-1.985_937_5, 0.0));
/// assert!((again[0] / 0.5 - 1.0).abs() < 0.02 && (again[2] / 1e-3 - 1.0).abs() < 0.05);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct BlockCodes {
    /// Four codes in a word, `[n_blocks * 64]`.
    words: Tensor<1, Int>,
    /// `[n_blocks]`.
    absmax: Tensor<1>,
    map: DynamicMap,
    n: usize,
}

impl BlockCodes {
    /// The values that share a factor.
    pub const BLOCK: usize = 256;

    /// The nearest codes of `values`, `[n]`, which are finite, and not negative for
    /// [`DynamicMap::Unsigned`].
    pub fn quantize(values: Tensor<1>, map: DynamicMap) -> Self {
        let (device, [n]) = (values.device(), values.dims());
        let n_blocks = n.div_ceil(Self::BLOCK);
        let n_padded = n_blocks * Self::BLOCK;
        let values = match n_padded - n {
            0 => values,
            n_missing => {
                let zeros = Tensor::zeros([n_missing], (&device, values.dtype()));
                Tensor::cat(vec![values, zeros], 0)
            }
        };
        let blocks = values.reshape([n_blocks, Self::BLOCK]);
        let absmax = blocks.clone().abs().max_dim(1);
        let shares = blocks / absmax.clone().clamp_min(f32::MIN_POSITIVE);
        let shares = shares.reshape([n_padded]);

        // The number of midpoints below a share is its code: found bit by bit.
        let levels = map.levels();
        let midpoints = levels.windows(2).map(|of| (of[0] + of[1]) / 2.0);
        let midpoints = TensorData::new(midpoints.collect::<Vec<f32>>(), [255]);
        let midpoints = Tensor::<1>::from_data(midpoints, &device);
        let mut codes = Tensor::<1, Int>::zeros([n_padded], &device);
        for bit in (0..8).rev().map(|k| 1i64 << k) {
            let midpoint = midpoints.clone().select(0, codes.clone() + (bit - 1));
            codes = codes + shares.clone().greater(midpoint).int() * bit;
        }
        let n_words = n_padded / 4;
        let codes = codes.cast(DType::U32).reshape([n_words, 4]);
        let byte = |k: usize| {
            let byte = codes.clone().narrow(1, k, 1);
            byte.bitwise_left_shift_scalar(8 * k as i64)
        };
        let words = (1..4).fold(byte(0), |word, k| word.bitwise_or(byte(k)));
        Self {
            words: words.reshape([n_words]),
            absmax: absmax.reshape([n_blocks]),
            map,
            n,
        }
    }

    /// The values, `[n]`.
    pub fn dequantize(&self) -> Tensor<1> {
        let device = self.absmax.device();
        let [n_words] = self.words.dims();
        let words = self.words.clone().reshape([n_words, 1]);
        let byte = |k: i64| {
            let byte = words.clone().bitwise_right_shift_scalar(8 * k);
            byte.bitwise_and_scalar(255)
        };
        let codes = Tensor::cat((0..4).map(byte).collect(), 1);
        let levels = TensorData::new(self.map.levels().to_vec(), [256]);
        let levels = Tensor::<1>::from_data(levels, &device);
        let levels = levels.select(0, codes.reshape([4 * n_words]));
        let [n_blocks] = self.absmax.dims();
        let blocks = levels.reshape([n_blocks, Self::BLOCK]);
        let values = blocks * self.absmax.clone().reshape([n_blocks, 1]);
        values
            .reshape([n_blocks * Self::BLOCK])
            .narrow(0, 0, self.n)
    }

    /// Makes values of codes and factors, as [`BlockCodes::codes`] and [`BlockCodes::absmax`] return them.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) if the factors are not one for each block,
    /// [`Error::NonFinite`](crate::Error::NonFinite) for one that is not finite.
    pub fn new(codes: Vec<u8>, absmax: Vec<f32>, map: DynamicMap, device: &Device) -> Result<Self> {
        let n = codes.len();
        let n_blocks = n.div_ceil(Self::BLOCK);
        check_length("absmax", n_blocks, absmax.len())?;
        check_finite("the absmax of the blocks", &absmax, 1)?;
        let mut bytes = codes;
        bytes.resize(n_blocks * Self::BLOCK, 0);
        let (words, _) = bytes.as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
        let words = TensorData::new(words, [n_blocks * Self::BLOCK / 4]);
        Ok(Self {
            words: Tensor::from_data(words, (device, DType::U32)),
            absmax: Tensor::from_data(TensorData::new(absmax, [n_blocks]), (device, DType::F32)),
            map,
            n,
        })
    }

    /// The codes, `n`.
    pub fn codes(&self) -> Vec<u8> {
        let words = words(self.words.clone()).into_iter();
        let mut codes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        codes.truncate(self.n);
        codes
    }

    /// The factor of each block.
    pub fn absmax(&self) -> Vec<f32> {
        floats(self.absmax.clone())
    }

    /// The number of values.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The bytes of codes and factors on the device.
    pub fn n_bytes(&self) -> usize {
        4 * (self.words.dims()[0] + self.absmax.dims()[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each value gets the nearest level of all, and what is written is read back.
    #[test]
    fn codes_are_the_nearest() {
        let device = Device::flex();
        let n = 1000;
        let unsigned: Vec<f32> = (0..n)
            .map(|k| 10f32.powf(-0.009 * k as f32) * 3.0)
            .collect();
        let signed: Vec<f32> = (unsigned.iter().enumerate())
            .map(|(k, v)| if k % 3 == 0 { -v } else { *v })
            .collect();
        for (map, values) in [
            (DynamicMap::Unsigned, unsigned),
            (DynamicMap::Signed, signed),
        ] {
            let levels = map.levels();
            let tensor = Tensor::from_data(TensorData::new(values.clone(), [n]), &device);
            let codes = BlockCodes::quantize(tensor, map);
            assert_eq!(codes.n_bytes(), 1024 + 4 * 4);
            let found = floats(codes.dequantize());
            let absmax = codes.absmax();
            for (k, value) in values.iter().enumerate() {
                let scale = absmax[k / BlockCodes::BLOCK];
                let distance = |level: f32| (level - value / scale).abs();
                let nearest = levels
                    .iter()
                    .map(|&level| distance(level))
                    .fold(2.0, f32::min);
                assert!(
                    distance(found[k] / scale) <= nearest + 1e-6,
                    "{value} {}",
                    found[k]
                );
                assert!(map == DynamicMap::Signed || found[k] > 0.0);
            }
            let again = BlockCodes::new(codes.codes(), absmax.clone(), map, &device).unwrap();
            assert_eq!(floats(again.dequantize()), found);
            let few = BlockCodes::new(codes.codes(), absmax[1..].to_vec(), map, &device);
            assert!(few.is_err());
        }
        let zeros = BlockCodes::quantize(Tensor::zeros([3], &device), DynamicMap::Unsigned);
        assert_eq!(floats(zeros.dequantize()), [0.0; 3]);
    }
}

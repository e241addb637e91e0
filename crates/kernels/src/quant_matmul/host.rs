//! A packed weight in host memory.

use super::packed::Precision;
use crate::layout::{Layout, TILE};

/// A packed weight in host memory.
pub(super) struct Host<'a> {
    pub(super) words: &'a [u32],
    pub(super) scales: &'a [f32],
    pub(super) zeros: Option<&'a [f32]>,
    pub(super) layout: Layout,
    pub(super) precision: Precision,
}

impl Host<'_> {
    /// The words of a tile, `[word_rows, TILE]`.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &[u32] {
        let n = self.layout.word_rows() * TILE;
        &self.words[tile * n..][..n]
    }

    /// The scales and zeros of group `g` in a tile; 0 in the columns that pad the tile.
    #[inline(always)]
    pub(super) fn grid(&self, tile: usize, g: usize) -> ([f32; TILE], [f32; TILE]) {
        let columns = self.layout.columns(tile);
        let row = |values: &[f32]| {
            let mut padded = [0.0; TILE];
            let values = &values[g * self.layout.d_out()..][columns.clone()];
            padded[..values.len()].copy_from_slice(values);
            padded
        };
        (row(self.scales), self.zeros.map_or([0.0; TILE], row))
    }

    /// The gradients of scales and zeros, `[n_groups, d_out]` each.
    ///
    /// `sums(tile, g)` are `Σ dy x (level - zero)` and `Σ dy x` of group `g` in the columns of a tile.
    pub(super) fn grid_gradients<'a, S: AsRef<[f32]> + ?Sized + 'a>(
        &self,
        sums: impl Fn(usize, usize) -> [&'a S; 2],
    ) -> (Vec<f32>, Vec<f32>) {
        let n = self.layout.n_groups() * self.layout.d_out();
        let (mut dscales, mut dzeros) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for g in 0..self.layout.n_groups() {
            for tile in 0..self.layout.n_tiles() {
                let width = self.layout.columns(tile).len();
                let [of_levels, of_products] = sums(tile, g);
                dscales.extend_from_slice(&of_levels.as_ref()[..width]);
                dzeros.extend_from_slice(&of_products.as_ref()[..width]);
            }
        }
        for (dz, s) in dzeros.iter_mut().zip(self.scales) {
            *dz *= -s;
        }
        (dscales, dzeros)
    }
}
